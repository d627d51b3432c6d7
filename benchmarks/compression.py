"""Bench: how fast guards encode and decode an update, and how many times fewer bytes it then has.

The update is SmolLM2-135M's with LoRA r = 16 on all linear layers (420 matrices, 19.5 MB fp32); its values are random,
and no model is needed. Bytes are those that engines send: safetensors, headers included. GB/s are of the fp32 update;
'copy' is the machine's own, in the same run. Measurements take turns and the best of several counts.

    python benchmarks/compression.py [--repeats 5] [--threads 1] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

from aggregation import lora_shapes, make_update
from fedlm.federation.engines.wire import serialized_size
from fedlm.guards import get_chain
from fedlm.messages import Tensors
from fedlm.recipe.guards import GuardSpec

CHAINS: dict[str, list[GuardSpec]] = {
    "bf16": [GuardSpec(name="bf16")],
    "fp16": [GuardSpec(name="fp16")],
    "int8": [GuardSpec(name="int8")],
    "int4": [GuardSpec(name="int4")],
    "int4, block 128": [GuardSpec(name="int4", block=128)],
    "topk 1 %": [GuardSpec(name="topk")],
    "topk 10 %": [GuardSpec(name="topk", density=0.1)],
    "topk 10 % + int4": [GuardSpec(name="topk", density=0.1), GuardSpec(name="int4")],
    "randk 1 %": [GuardSpec(name="randk")],
    "randk 10 % + int4": [GuardSpec(name="randk", density=0.1), GuardSpec(name="int4")],
    "lowrank 4": [GuardSpec(name="lowrank")],
    "lowrank 4 + int4": [GuardSpec(name="lowrank"), GuardSpec(name="int4")],
}


def measure(update: Tensors, repeats: int) -> list[dict[str, float | str]]:
    """For each chain: ratio of bytes, GB/s of encoding (alone and with error feedback) and decoding, relative error."""
    size, fp32 = sum(tensor.nbytes for tensor in update.values()), serialized_size(update)
    shapes = {name: tensor.shape for name, tensor in update.items()}
    source, target = torch.cat([tensor.reshape(-1) for tensor in update.values()]), torch.zeros(size // 4)
    norm = float(source.norm())
    rows: list[dict[str, float | str]] = []
    best: dict[tuple[str, str], float] = {}

    def note(name: str, what: str, work: Callable[..., object], *arguments: object) -> None:
        began = time.perf_counter()
        work(*arguments)
        best[name, what] = min(best.get((name, what), float("inf")), time.perf_counter() - began)

    chains = {name: get_chain(specs) for name, specs in CHAINS.items()}
    fed_back = {name: get_chain(specs, feedback=True) for name, specs in CHAINS.items()}
    payloads: dict[str, Tensors] = {}
    errors: dict[str, float] = {}
    for name, chain in chains.items():
        assert chain is not None
        payloads[name] = chain.encode(update, (0, name))
        back = chain.decode(payloads[name], shapes, (0, name))
        errors[name] = sum(float((back[n] - update[n]).square().sum()) for n in update) ** 0.5 / norm
    for _ in range(repeats):
        note("copy", "copy", target.copy_, source)
        for name, chain in chains.items():
            again = fed_back[name]
            assert chain is not None and again is not None
            key = (0, name)
            kept = again.encode_with_feedback(update, {}, key)[1]
            note(name, "encode", chain.encode, update, key)
            note(name, "feedback", again.encode_with_feedback, update, kept, key)
            note(name, "decode", chain.decode, payloads[name], shapes, key)
    rows.append({"guards": "copy", "encode": size / best["copy", "copy"] / 1e9})
    for name in chains:
        row: dict[str, float | str] = {"guards": name, "ratio": fp32 / serialized_size(payloads[name])}
        row |= {what: size / best[name, what] / 1e9 for what in ("encode", "feedback", "decode")}
        rows.append({**row, "bytes": serialized_size(payloads[name]), "error": errors[name]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="as a silo's worker has")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    update = make_update(lora_shapes(options.rank), torch.float32, 0, one_buffer=False)
    rows = measure(update, options.repeats)
    if options.json:
        print(json.dumps({"threads": options.threads, "rows": rows}))
        return
    size = serialized_size(update)
    print(f"{options.threads} threads; r = {options.rank}: {len(update)} matrices, {size:,} bytes as fp32")
    print(f"{'guards':20} {'bytes':>10} {'ratio':>7} {'encode':>7} {'+ error feedback':>16} {'decode':>7}  GB/s, error")
    print(f"{'copy':20} {'':10} {'':7} {rows[0]['encode']:7.2f}")
    for row in rows[1:]:
        print(
            f"{row['guards']:20} {row['bytes']:10,} {row['ratio']:6.1f}x {row['encode']:7.2f} {row['feedback']:16.2f} "
            f"{row['decode']:7.2f}        {row['error']:.3f}"
        )


if __name__ == "__main__":
    main()
