"""A small message cannot make anybody allocate much: whatever it says of sizes, memory is taken for what is there."""

from __future__ import annotations

import subprocess
import sys

MOST = 64 * 2**20
"""Bytes that a message of some hundred bytes may cost at its worst."""

CASES = """
import json, resource, struct, sys, tempfile, zipfile
from pathlib import Path
import torch
from fedlm.federation.engines.flare.envelope import unpack
from fedlm.federation.engines.flare.parts import Incoming
from fedlm.federation.engines.lazy import FileTensors, checked_tensors
from fedlm.federation.silo import state
from fedlm.federation.silo.pairs import PairTables
from fedlm.federation.silo.scored import read_candidates
from fedlm.guards import get_chain
from fedlm.recipe.capacity import parse_capacity
from fedlm.recipe.guards import GuardSpec
from fedlm.recipe.yamltree import parse_yaml
import fedlm.federation.engines.flare.enrol as enrol

folder = Path(tempfile.mkdtemp())

def tensors(header, body=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / "file"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)
    return path

def about(dtype, shape, start, stop):
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}}

i32 = torch.int32
doubling = torch.tensor([[97, 97], *[[256 + i, 256 + i] for i in range(40)]], dtype=i32)
none = torch.zeros(0, dtype=i32)
bomb = {"merges": doubling, "rows": none, "columns": none}
huge = torch.zeros(1, dtype=torch.uint8).expand(2**40)
stretched = {"0.peak": torch.ones(1), "0.scales": huge.view(torch.uint8), "0.codes": huge}
pairs = zip("abcdefghijk", "bcdefghijkl")
laughs = "a: &a [x,x,x,x]\\n" + "".join(f"{b}: &{b} [*{a},*{a},*{a},*{a}]\\n" for a, b in pairs)
int8 = get_chain([GuardSpec(name="int8")])
topk = get_chain([GuardSpec(name="topk", k=3)])
cases = {
    "envelope": lambda: unpack(struct.pack(">I", 2**32 - 1) + b"{}"),
    "envelope, longest header": lambda: unpack(struct.pack(">I", 32 * 2**20) + b"{}"),
    "header of 2**63": lambda: FileTensors(tensors(b"{}", length=2**63 - 1)),
    "header of 8 MiB": lambda: FileTensors(tensors(b"{}", length=8 * 2**20)),
    "terabytes": lambda: FileTensors(tensors(about("F32", [2**40], 0, 2**42))),
    "terabytes, at once": lambda: checked_tensors(tensors(about("F32", [2**40], 0, 2**42))),
    "no bytes": lambda: checked_tensors(tensors(about("F32", [0, 2**61], 0, 0))),
    "offsets": lambda: FileTensors(tensors(about("U8", [2**62], 2**62, 2**63))),
    "state": lambda: safe(tensors(about("F64", [2**50], 0, 2**53))),
    "announced file": lambda: Incoming(folder, "0" * 64, 2**50),
    "merges that double": lambda: PairTables().answer("s", [{"text": "aaaa"}], "text", bomb),
    "text": lambda: read_candidates({"text": huge}),
    "int8 part": lambda: int8.decode(stretched, {"x": torch.Size([64])}, (0,)),
    "topk part": lambda: topk.decode({"0.indices": huge, "values": torch.ones(3)}, {"x": torch.Size([1024])}, (0,)),
    "laughs": lambda: parse_yaml(laughs, "x"),
    "capacity": lambda: parse_capacity({"memory": "9" * 100 + "GB"}),
}

def safe(path):
    target = folder / "s/run/round-0000.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    state.StateStore(folder, "s").load("run", 0)

def used():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024

resource.setrlimit(resource.RLIMIT_AS, (used() + 2**31, -1))
for name, case in cases.items():
    try:
        case()  # once for what is imported or started late
    except Exception:
        pass
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
for name, case in cases.items():
    resource.setrlimit(resource.RLIMIT_AS, (used() + MOST, -1))
    try:
        case()
        print("ok", name)
    except MemoryError:
        print("MEMORY", name)
    except Exception as error:
        text = str(error)
        print("MEMORY" if "memory" in text and "allocate" in text else "refused", name, type(error).__name__)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
"""


def test_a_small_message_costs_little_memory() -> None:
    """Under a limit of 64 MiB above what the process has, every one of the worst headers is refused as what it is."""
    code = CASES.replace("MOST", str(MOST))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in lines if not line.startswith("refused")], lines
    assert len(lines) == 16
