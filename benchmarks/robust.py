"""Bench: the server's step of every rule against bad silos, on updates as they travel and on LoRA's products.

Updates are of LoRA factors for every linear layer of SmolLM2-135M (4.9 million values at rank 16); the first few MB
wait in memory, the rest on disk (page cache). 'fold' is what it takes to put all of them there and is no part of the
step. Two silos are bad: they send the others' direction turned round, ten times as large.

    python benchmarks/robust.py [--silos 50] [--rank 16] [--layers 30] [--rules a,b] [--on factors,product] [--groups G]
    python benchmarks/robust.py --quick      a few layers and silos: whether it works
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aggregation import LINEAR
from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.messages import Tensors
from fedlm.models.deltas import pieces_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

BAD = 2
OPTIONS: dict[str, dict[str, Any]] = {"fltrust": {"root": "silo-000"}, "flame": {"noise": 0.0}}
RULES = ("fedavg", *(name for name, method in ALGORITHMS.items() if "robust_on" in method.options))


def factors(layers: int, rank: int, draw: torch.Generator, size: float) -> Tensors:
    found: Tensors = {}
    for layer in range(layers):
        for module, (out, into) in LINEAR.items():
            name = f"model.layers.{layer}.{module}"
            found[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=draw) * size / into**0.5
            found[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * size * 0.1
    return found


def updates(options: argparse.Namespace) -> list[Tensors]:
    """What silos have learnt in common is as large as what each has learnt alone."""
    draw = torch.Generator().manual_seed(1)
    common = factors(options.layers, options.rank, draw, 0.1)
    own: list[Tensor] = [torch.randn(v.numel() + 9973 * options.silos, generator=draw) for v in common.values()]
    found = []
    for i in range(options.silos):
        sign = -10.0 if i >= options.silos - BAD else 1.0
        found.append(
            {
                name: sign * (v + float(v.std()) * pool[9973 * i : 9973 * i + v.numel()].view_as(v))
                for (name, v), pool in zip(common.items(), own, strict=True)
            }
        )
    return found


def change(before: Tensors, after: Tensors) -> Tensor:
    """Of what acts of the first layer's first matrix, in units of s."""
    layer = "model.layers.0.self_attn.q_proj"
    old, new = ({part: model[f"{layer}.lora_{part}.weight"] for part in "AB"} for model in (before, after))
    found = new["B"] @ new["A"] - old["B"] @ old["A"]
    for piece in pieces_of(after).get(layer, {}).values():
        found += (piece[0] @ piece[1] if len(piece) == 2 else piece[0]) / 2.0
    return found


def measure(rule: str, on: str, theta: Tensors, sent: list[Tensors], options: argparse.Namespace) -> dict[str, Any]:
    method = ALGORITHMS[rule]
    settings = {"robust_on": on} if "robust_on" in method.options else {}
    if method.withstands is not None:
        settings["byzantine"] = BAD
    if options.groups and "groups" in method.options:
        settings["groups"] = options.groups
    spec = AlgorithmSpec(name=rule, **settings, **OPTIONS.get(rule, {}))
    algorithm = get_algorithm(spec, AdapterSpec(rank=options.rank, alpha=2.0 * options.rank))
    state = algorithm.init_state(theta)
    with tempfile.TemporaryDirectory() as folder:
        accumulator = algorithm.accumulator(Path(folder))
        names = [f"silo-{i:03}" for i in range(len(sent))]
        algorithm.asked(accumulator, names, Place("", 0, 9, 7))
        began = time.perf_counter()
        for name, update in zip(names, sent, strict=True):
            algorithm.fold(accumulator, update, 1.0, Place(name, 0, 9, 7, options.rank))
        fold = time.perf_counter() - began
        began, busy = time.perf_counter(), time.process_time()
        after, _ = algorithm.server_step(theta, accumulator, state, Step(0, len(sent)))
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
    wanted = change(theta, {name: theta[name] + u for name, u in sent[0].items()})
    found = change(theta, after)
    cosine = float(found.flatten() @ wanted.flatten() / (found.norm() * wanted.norm()).clamp(min=1e-30))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rule": rule, "on": on, "fold": fold, "step": seconds, "cpu": busy, "cosine": cosine, "peak_mb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--groups", type=int, default=0)
    parser.add_argument("--rules", type=lambda text: text.split(","), default=RULES)
    parser.add_argument("--on", type=lambda text: text.split(","), default=["factors", "product"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.silos, options.layers, options.rank = 12, 1, 4
    theta = factors(options.layers, options.rank, torch.Generator().manual_seed(0), 1.0)
    sent = updates(options)
    values = sum(v.numel() for v in theta.values())
    say = (lambda *_, **__: None) if options.json else print
    say(
        f"{options.silos} silos of {values:,} values, {torch.get_num_threads()} threads; load {os.getloadavg()[0]:.0f}"
        f"\n{'rule':18} {'on':8} {'fold s':>7} {'step s':>7} {'of CPU':>7} {'cos to an honest one':>21}"
    )
    rows = []
    for rule in options.rules:
        for on in options.on if rule != "fedavg" and not ALGORITHMS[rule].no_product else ["factors"]:
            rows.append(row := measure(rule, on, theta, sent, options))
            say(
                f"{rule:18} {on:8} {row['fold']:7.2f} {row['step']:7.2f} {row['cpu']:7.2f} {row['cosine']:21.2f}",
                flush=True,
            )
    given = 4e-6 * values * len(sent)
    say(f"largest resident memory: {rows[-1]['peak_mb']:.0f} MB; the bench's own copy of the updates is {given:.0f}")
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
