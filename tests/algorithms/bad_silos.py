"""Honest silos that learn alike, bad ones that send what they like, and one step of a rule over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.attacks.silos import inner_product, little
from fedlm.messages import Fields, Tensors
from fedlm.models.deltas import deltas_of
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

F64 = NDArray[np.float64]
LAYERS = {"m.a": (20, 30), "m.b": (24, 16)}
"""[d_out, d_in] of the layers that silos have factors of; beside them there is a head."""
HEAD = "score.weight"
RANK, ALPHA = 3, 12.0
ADAPTER = AdapterSpec(rank=RANK, alpha=ALPHA)
SCALE = ALPHA / RANK


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def theta(layers: dict[str, tuple[int, int]] = LAYERS) -> Tensors:
    """A global model after some rounds: B is no longer 0."""
    found = {HEAD: 0.1 * draw(3, 5, seed=9)}
    for i, (layer, (d_out, d_in)) in enumerate(layers.items()):
        found[f"{layer}.lora_A.weight"] = draw(RANK, d_in, seed=20 + i) / d_in**0.5
        found[f"{layer}.lora_B.weight"] = 0.3 * draw(d_out, RANK, seed=30 + i)
    return found


def honest(count: int, spread: float = 0.5, seed: int = 0) -> list[Tensors]:
    """Updates that share a direction and differ by `spread` of it."""
    start = theta()
    common = {name: 0.05 * draw(*value.shape, seed=len(name)) for name, value in start.items()}
    return [
        {name: u + 0.05 * spread * draw(*u.shape, seed=1000 * seed + 50 * i + len(name)) for name, u in common.items()}
        for i in range(count)
    ]


def flat(update: Tensors) -> F64:
    return torch.cat([update[name].reshape(-1).double() for name in sorted(update)]).numpy()


def acting(model: Tensors) -> F64:
    """What acts of a model: s B A and the deltas of every layer, and the head, as one vector."""
    deltas = deltas_of({name: value.double() for name, value in model.items()})
    parts = []
    for layer in LAYERS:
        a, b = (model[f"{layer}.lora_{part}.weight"].double() for part in "AB")
        dense = SCALE * b @ a
        if layer in deltas:
            delta = deltas[layer]
            low = 0 if delta.A is None or delta.B is None else delta.B @ delta.A
            dense = dense + low + (0 if delta.W is None else delta.W)
        parts.append(dense.reshape(-1))
    return torch.cat([*parts, model[HEAD].double().reshape(-1)]).numpy()


def changes(updates: Sequence[Tensors]) -> F64:
    """[n, all values] of what each silo's update changes of what acts."""
    start = theta()
    own = [acting({name: start[name] + update[name] for name in start}) for update in updates]
    return np.stack(own) - acting(start)


def step(
    updates: Sequence[Tensors],
    spool: Path,
    *,
    weights: Sequence[float] | None = None,
    state: Tensors | None = None,
    start: Tensors | None = None,
    round_: int = 0,
    **spec: Any,
) -> tuple[Tensors, Tensors, Fields]:
    """The model and state after a round of these updates, of silo-00, silo-01 ..., and the step's figures."""
    algorithm, start = get_algorithm(AlgorithmSpec(**spec), ADAPTER), theta() if start is None else start
    state = algorithm.init_state(start) if state is None else state
    accumulator = algorithm.accumulator(spool)
    names = [f"silo-{i:02}" for i in range(len(updates))]
    algorithm.asked(accumulator, names, Place("", round_, 9, 5))
    for i, (name, update) in enumerate(zip(names, updates, strict=True)):
        place = Place(name, round_, 9, 5, RANK)
        algorithm.fold(accumulator, update, 1.0 if weights is None else weights[i], place)
    after = algorithm.server_step(start, accumulator, state, Step(round_, len(updates)))
    return *after, algorithm.measure((start, state), accumulator, after, round_)


def moved(updates: Sequence[Tensors], spool: Path, **options: Any) -> F64:
    """How far the model moved: of the factors as one vector, or of what acts."""
    start = theta()
    after, _, _ = step(updates, spool, **options)
    if options.get("robust_on") == "product":
        return acting(after) - acting(start)
    return flat(after) - flat(start)


# attacks: the bad silos' updates, who know the honest ones; those of papers are in fedlm.attacks.silos


def huge(good: Sequence[Tensors], bad: int) -> list[Tensors]:
    """The largest values that an update may have."""
    return [{n: torch.full_like(u, 1e32 * (-0.5) ** i) for n, u in good[0].items()} for i in range(bad)]


def together(good: Sequence[Tensors], bad: int) -> list[Tensors]:
    """One and the same far point, from all of them."""
    return [{n: u - 100.0 * u.abs().max() for n, u in good[0].items()} for _ in range(bad)]


ATTACKS = {"huge": huge, "together": together, "little": little, "inner product": inner_product}
