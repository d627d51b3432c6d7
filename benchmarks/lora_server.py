"""Bench: the server's step of every LoRA method, relative to one dense product of the silos' mean change.

The unit is [p_1 s_1 B_1, p_2 s_2 B_2 ...] [A_1; A_2; ...] for every linear layer of SmolLM2-135M, from factors that lie
in memory side by side. A method's step begins with the folded updates, and reads them back from disk (page cache) where
it needs them one by one. 'fold' is what it takes to put all of them there, 'measure' the aggregation error in fp64;
neither is part of the step. Measurements take turns and the best of several counts, since other work only ever makes
them slower.

    python benchmarks/lora_server.py [--silos 50] [--rank 16] [--layers 30] [--methods a,b] [--repeats 3] [--threads N]

Goals with 50 silos of rank 16: methods without a dense matrix <= 1x, randomised SVD <= 3x with at most 1.01 times the
error of the best truncation, exact SVD <= 6x.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aggregation import LINEAR
from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Algorithm, Place, Step
from fedlm.algorithms.lora import LoRAMethod, Trained
from fedlm.algorithms.lowrank import LowRank, add_up, truncated
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

STEP = 9973
"""How far the windows of two silos lie apart in the pool of normals."""

ROUND = 1
"""Past the first one, which is special to some methods."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name, method in ALGORITHMS.items() if method.adapters in (("lora",), ("lora-sb",))},
    "flexlora, randomised": ("flexlora", {"svd": "randomised"}),
}


def first_values(layers: int, rank: int, square: bool) -> Tensors:
    """Factors as after some rounds of training."""
    draw = torch.Generator().manual_seed(0)
    values: Tensors = {}
    for layer in range(layers):
        for module, (out, into) in LINEAR.items():
            name = f"model.layers.{layer}.{module}"
            values[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=draw) / (3 * into) ** 0.5
            values[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=draw) * 0.01
            if square:
                values[f"{name}.lora_R.weight"] = torch.randn(rank, rank, generator=draw) * 0.01
    return values


class Updates:
    """What silos have learnt in common is as large as what they have learnt alone."""

    def __init__(self, shapes: dict[str, torch.Size], silos: int) -> None:
        self.shapes, draw = shapes, torch.Generator().manual_seed(1)
        self.common = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        size = sum(shape.numel() for shape in shapes.values())
        self.pool = torch.randn(size + silos * STEP, generator=draw)  # every silo has a window of its own

    def of(self, silo: int) -> Tensors:
        update, start = {}, silo * STEP
        for name, shape in self.shapes.items():
            value = self.common[name] + self.pool[start : start + shape.numel()].view(shape)
            start += shape.numel()
            if name.endswith(".gram"):
                value = value @ value.t() if len(shape) == 2 else value.square()
            update[name] = value * (0.01 if ".lora_B." in name else 0.01 / 3)
        return update


def clock(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Unit:
    """The dense products, all layers once."""

    def __init__(self, layers: int, silos: int, rank: int) -> None:
        self.layers = layers
        self.stacks = [
            (torch.randn(out, silos * rank) * 0.01, torch.randn(silos * rank, into)) for out, into in LINEAR.values()
        ]

    def __call__(self) -> None:
        for _ in range(self.layers):
            for b, a in self.stacks:
                b @ a


def folded(algorithm: Algorithm, theta: Tensors, silos: int, rank: int, spool: Path) -> tuple[Any, float]:
    accumulator, seconds = algorithm.accumulator(spool), 0.0
    updates = Updates(algorithm.expected_update(theta, Place("silo", ROUND, 9, rank=rank)), silos)
    for i in range(silos):
        place, update = Place(f"silo-{i:03}", ROUND, 9, rank=rank), updates.of(i)
        seconds += clock(lambda u=update, p=place, n=i: algorithm.fold(accumulator, u, 1.0 + n % 5, p))
    return accumulator, seconds


def best_error(method: LoRAMethod, theta: Tensors, stored: Stored, layers: list[str], rank: int) -> float:
    """|found - mean| / |best - mean| over some layers, for what the server's SVD finds, with fp64's singular values."""
    trained = Trained(method, (theta, {}), stored, ROUND)
    missed = best = 0.0
    generator = torch.Generator().manual_seed(0) if method.spec.svd == "randomised" else None
    for layer in layers:
        d_out, d_in = trained.layers[layer]
        mean = add_up(trained.terms(layer), d_out, d_in)
        dense = (mean.dense() if isinstance(mean, LowRank) else mean).double()
        found = truncated(mean, rank, generator=generator)
        missed += float((dense - found.B.double() @ found.A.double()).square().sum())
        best += float(torch.linalg.svdvals(dense)[rank:].square().sum())
    return (missed / best) ** 0.5


def measure(case: str, options: argparse.Namespace, unit: Unit, spool: Path) -> dict[str, Any]:
    name, settings = CASES[case]
    kind = "lora-sb" if "lora-sb" in ALGORITHMS[name].adapters else "lora"
    adapter = AdapterSpec(kind=kind, rank=options.rank, alpha=2.0 * options.rank)
    algorithm = get_algorithm(AlgorithmSpec(name=name, **settings), adapter)
    theta = algorithm.initial(lambda: first_values(options.layers, options.rank, kind == "lora-sb"))
    state = algorithm.init_state(theta)
    accumulator, fold = folded(algorithm, theta, options.silos, options.rank, spool)
    row: dict[str, Any] = {"case": case, "fold": fold, "step": float("inf"), "unit": float("inf")}
    after: tuple[Tensors, Tensors] = ({}, {})
    sums = {name: total.clone() for name, total in accumulator.total.items()}

    def step() -> None:
        nonlocal after
        after = algorithm.server_step(theta, accumulator, state, Step(ROUND, options.silos))

    for _ in range(options.repeats):
        row["unit"] = min(row["unit"], clock(unit))
        for total, summed in sums.items():  # a step divides them in place
            accumulator.total[total].copy_(summed)
        row["step"] = min(row["step"], clock(step))
    row["ratio"] = row["step"] / row["unit"]
    began = time.perf_counter()
    row |= algorithm.measure((theta, state), accumulator, after, ROUND)
    row["measure"] = time.perf_counter() - began
    if name == "flexlora":
        assert isinstance(algorithm, LoRAMethod)
        some = [f"model.layers.0.{module}" for module in LINEAR]
        row["of_best"] = best_error(algorithm, theta, accumulator, some, options.rank)
    return row


def crossover(rank: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a truncated SVD from factors (QR) and from the dense matrix (eigh, its product included), by the ranks
    of all silos together."""
    rows = []
    for d_out, d_in in dict.fromkeys(LINEAR.values()):
        for stack in (16, 32, 64, 128, 192, 256, 384, 512):
            if stack >= min(d_out, d_in):
                continue
            factors = LowRank(torch.randn(d_out, stack), torch.randn(stack, d_in))
            found = {"matrix": f"{d_out} x {d_in}", "ranks": stack, "factors": float("inf"), "dense": float("inf")}
            found["chosen"] = "factors" if stack <= min(d_out, d_in) // 3 else "dense"
            for _ in range(repeats):
                found["factors"] = min(found["factors"], clock(lambda f=factors: truncated_by("_by_qr", f, rank)))
                found["dense"] = min(found["dense"], clock(lambda f=factors: truncated_by("_by_eigh", f.dense(), rank)))
            rows.append(found)
    return rows


def truncated_by(route: str, matrix: LowRank | Tensor, rank: int) -> LowRank:
    from fedlm.algorithms import lowrank

    found: LowRank = getattr(lowrank, route)(matrix, rank)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--silos", type=int, default=50)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--crossover", action="store_true", help="also where factors and dense matrices cost the same")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    unit = Unit(options.layers, options.silos, options.rank)
    unit()
    say = (lambda *_, **__: None) if options.json else print
    say(
        f"{options.silos} silos, rank {options.rank}, {len(LINEAR) * options.layers} layers, "
        f"{torch.get_num_threads()} threads; unit: one dense product of the mean change\n"
        f"{'':22} {'unit s':>7} {'step s':>7} {'step/unit':>9} {'fold s':>7} {'measure s':>9} {'error':>9} {'/best':>7}"
    )
    rows = []
    for case in CASES:
        if options.methods and CASES[case][0] not in options.methods:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row := measure(case, options, unit, Path(folder)))
        error = row.get("aggregation_error")
        say(
            f"{row['case']:22} {row['unit']:7.2f} {row['step']:7.2f} {row['ratio']:8.2f}x {row['fold']:7.2f} "
            f"{row['measure']:9.2f} {'-' if error is None else format(error, '9.1e'):>9} "
            f"{format(row['of_best'], '7.4f') if 'of_best' in row else '':>7}",
            flush=True,
        )
    table = crossover(options.rank, options.repeats) if options.crossover else []
    if table:
        say(f"\n{'truncated SVD':13} {'ranks':>6} {'factors ms':>11} {'dense ms':>9}  chosen")
    for row in table:
        say(
            f"{row['matrix']:13} {row['ranks']:6} {row['factors'] * 1e3:11.2f} {row['dense'] * 1e3:9.2f} "
            f" {row['chosen']}"
        )
    if options.json:
        print(json.dumps({"threads": torch.get_num_threads(), "rows": rows, "crossover": table}))


if __name__ == "__main__":
    main()
