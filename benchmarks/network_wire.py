"""Bench e: what the wire costs between processes with mutual TLS, against NVFlare's own exchange of the same tensors.

    python benchmarks/network_wire.py [--silos 3] [--megabytes 50] [--repeats 5]

A coordinator and the silos, each with NVFlare's process and a worker that echoes, on loopback. Printed: seconds of a
round with empty messages (goal <= 0.5), seconds of a round trip of fp32 tensors to all silos at once through fedlm's
engine and through NVFlare alone (`benchmarks/parts/bare_nvflare.py`), alternating in one run, and the ratio of the
medians (goal <= 1.3). fedlm's side reads and writes files on both ends and checks SHA-256; both compare every value.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from fedlm.federation.engines.flare.engine import FlareEngine
from fedlm.federation.engines.flare.kit import Kit
from fedlm.federation.engines.flare.processes import Child
from fedlm.federation.engines.flare.rehearsal import Rehearsal
from fedlm.messages import Fields, Reply, Request, Tensors
from fedlm.recipe.schema import Recipe

PARTS = Path(__file__).parent / "parts"


class Wire(FlareEngine):
    """The engine without a model to compare: nothing is trained here."""

    def _introduction(self) -> Fields:
        return {}


def recipe() -> Recipe:
    return Recipe.model_validate(
        {
            "name": "wire",
            "model": {"source": "none"},
            "data": {"at_silos": True},
            "training": {"steps": 1},
        }
    )


def echo_worker(kit: Kit) -> Child:
    return Child("worker", "echo_worker", ["--kits", str(kit.path)], environment=on_path())


def on_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(PARTS), os.environ.get("PYTHONPATH", "")])}


def tensors(megabytes: int) -> Tensors:
    return {f"layer.{i}": torch.randn(2**18) for i in range(megabytes)}


def round_trip(engine: FlareEngine, silos: list[str], sent: Tensors, number: int) -> float:
    """Seconds until every silo's echo has come back and was compared."""
    started = time.perf_counter()
    left = set(silos)
    for answer in engine.exchange([Request(silo, "train", "wire", number, 0, sent, {}) for silo in silos]):
        assert isinstance(answer, Reply), answer
        assert all(torch.equal(answer.tensors[n], sent[n]) for n in sent)
        left.discard(answer.silo)
    assert not left
    return time.perf_counter() - started


def add_bare(network: Rehearsal, path: Path) -> None:
    """Put NVFlare's bare exchange beside the relays."""
    for name, child in network.children.items():
        if name.endswith("worker"):
            continue
        file = network.kits[name].local / "resources.json"
        resources = json.loads(file.read_text())
        component = "bare_nvflare." + ("BareCoordinator" if name == "coordinator" else "BareSilo")
        resources["class_allow_list"].append(component)
        resources["components"].append({"id": "bare", "path": component, "args": {}})
        file.write_text(json.dumps(resources))
        child.environment |= on_path() | {"BARE_SOCKET": str(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--silos", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    silos = [f"silo-{i}" for i in range(options.silos)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        network = Rehearsal(folder / "kits", silos, echo_worker)
        add_bare(network, folder / "bare.sock")
        with network:
            engine = Wire(recipe(), network.coordinator.path, "wire", folder / "run")
            idle = [round_trip(engine, silos, {}, i) for i in range(20)]
            print(f"empty round, {options.silos} silos: {statistics.median(idle) * 1000:.1f} ms (goal <= 500 ms)")
            bare = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            bare.connect(str(folder / "bare.sock"))
            ours, theirs = [], []
            with bare.makefile("rw") as stream:
                for number in range(options.repeats + 1):
                    stream.write(json.dumps({"megabytes": options.megabytes, "silos": silos}) + "\n")
                    stream.flush()
                    theirs.append(float(json.loads(stream.readline())["seconds"]))
                    ours.append(round_trip(engine, silos, tensors(options.megabytes), number))
                    print(f"  fedlm {ours[-1]:.2f} s, NVFlare alone {theirs[-1]:.2f} s{' (warm-up)' * (not number)}")
            engine.close()
    a, b = statistics.median(ours[1:]), statistics.median(theirs[1:])
    print(f"{options.megabytes} MB to {options.silos} silos and back: fedlm {a:.2f} s, NVFlare alone {b:.2f} s")
    print(f"ratio {a / b:.2f} (goal <= 1.3)")


if __name__ == "__main__":
    sys.exit(main())
