"""Silos of two linear layers, each with a weight of its own to learn by LoRA of its own rank: rounds over them, with
what every silo's layers really were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import LocalRule, Place, Step
from fedlm.messages import Fields, Tensors
from fedlm.models.deltas import deltas_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

SHAPES = {"a": (20, 30), "b": (24, 16)}
"""[d_out, d_in] of the layers."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def effective(values: Tensors, adapter: AdapterSpec) -> dict[str, Tensor]:
    """By layer, what is added to the frozen weight (fp64)."""
    added = {}
    for layer in SHAPES:
        a, b = values[f"{layer}.lora_A.weight"], values[f"{layer}.lora_B.weight"]
        added[layer] = adapter.scale(len(a)) * b.double() @ a.double()
    for layer, delta in deltas_of({name: value.double() for name, value in values.items()}).items():
        low = 0 if delta.A is None else delta.B @ delta.A  # type: ignore[operator]
        added[layer] = added[layer] + low + (0 if delta.W is None else delta.W)
    return added


class LayerSession:
    """A silo's round on its layers: AdamW on the squared distance to its target."""

    def __init__(self, place: Place, target: dict[str, Tensor], adapter: AdapterSpec, lr: float) -> None:
        self.place, self.target, self.adapter, self.lr = place, target, adapter, lr

    def train(self, rule: LocalRule, *, purpose: str = "") -> tuple[Any, Tensors]:  # noqa: ARG002
        start = rule.start()
        self.parameters = {n: Parameter(v.clone()) for n, v in start.items() if ".lora_" in n and rule.trains(n)}
        values = start | self.parameters
        deltas = {layer: delta.dense() for layer, delta in deltas_of(start).items()}
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=self.lr)
        for _ in range(6):
            optimizer.zero_grad()
            loss = torch.zeros(())
            for layer, target in self.target.items():
                a, b = values[f"{layer}.lora_A.weight"], values[f"{layer}.lora_B.weight"]
                loss = loss + (self.adapter.scale(len(a)) * b @ a + deltas.get(layer, 0) - target).square().mean()
            loss.backward()
            rule.correct(self.parameters)
            optimizer.step()
        self.values = {n: v.detach() for n, v in values.items()}
        return SimpleNamespace(), {n: p.detach().clone() for n, p in self.parameters.items()}


@dataclass
class LayerFederation:
    """Rounds in which every silo of `ranks` takes part.

    Attributes:
        trained: by silo, what its layers had added to them after the last round's training.
        changes: by silo, the part of that which its A and B make up.
        values: by silo, what it had after the last round's training.
        updates, places: by silo, what left it and what the coordinator knows of where it was made.
        figures: what was measured of the last round.
    """

    name: str
    ranks: Sequence[int]
    folder: Path
    rank: int = 4
    alpha: float = 10.0
    rslora: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    weights: Sequence[float] = (1.0, 5.0, 2.0, 3.0, 4.0, 6.0)
    alike: bool = False
    lr: float = 0.05
    done: int = 0
    figures: Fields = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.adapter = AdapterSpec(rank=self.rank, alpha=self.alpha, rslora=self.rslora)
        self.algorithm = get_algorithm(AlgorithmSpec(name=self.name, **self.options), self.adapter)
        if ALGORITHMS[self.name].equal_weights:
            self.weights = [1.0] * len(self.ranks)
        self.theta = self.algorithm.initial(self.first)
        self.server = self.algorithm.init_state(self.theta)
        self.states: list[Tensors] = [{} for _ in self.ranks]
        common = {layer: draw(*shape, seed=7) for layer, shape in SHAPES.items()}
        self.targets = [
            {layer: common[layer] + (0 if self.alike else draw(*shape, seed=50 + i)) for layer, shape in SHAPES.items()}
            for i in range(len(self.ranks))
        ]

    def first(self) -> Tensors:
        values: Tensors = {}
        for layer, (d_out, d_in) in SHAPES.items():
            values[f"{layer}.lora_A.weight"] = draw(self.rank, d_in, seed=3) / (3 * d_in) ** 0.5
            values[f"{layer}.lora_B.weight"] = torch.zeros(d_out, self.rank)
        return values

    def round(self, among: Sequence[int] | None = None) -> None:
        broadcast = self.algorithm.broadcast(self.theta, self.server, self.done)
        accumulator = self.algorithm.accumulator(self.folder)
        self.trained: dict[int, dict[str, Tensor]] = {}
        self.changes: dict[int, dict[str, Tensor]] = {}
        self.reported: dict[int, int] = {}
        self.updates: dict[int, Tensors] = {}
        self.places: dict[int, Place] = {}
        self.values: dict[int, Tensors] = {}
        for i in range(len(self.ranks)) if among is None else among:
            place = Place(f"silo-{i}", self.done, 9, seed=1, rank=self.ranks[i])
            received = self.algorithm.for_rank(broadcast, place.rank)
            rule = self.algorithm.local(received, self.states[i], place)
            session = LayerSession(place, self.targets[i], self.adapter, self.lr)
            outcome = rule.run(session)  # type: ignore[arg-type]
            self.states[i], self.updates[i] = outcome.state, outcome.update
            self.reported[i] = outcome.fields.get("rank", place.rank)
            self.values[i] = session.values
            self.trained[i] = effective(session.values, self.adapter)
            factors = {n: v for n, v in session.values.items() if ".lora_" in n}
            self.changes[i] = effective(factors, self.adapter)
            told = self.places[i] = Place(place.silo, place.round, 9, seed=1, rank=self.reported[i])
            expected = self.algorithm.expected_update(self.theta, told)
            assert {name: value.shape for name, value in outcome.update.items()} == expected
            self.algorithm.fold(accumulator, outcome.update, self.weights[i], told)
        before = (self.theta, self.server)
        self.theta, self.server = self.algorithm.server_step(
            self.theta, accumulator, self.server, Step(self.done, len(self.ranks))
        )
        self.figures = self.algorithm.measure(before, accumulator, (self.theta, self.server), self.done)
        self.done += 1

    def loaded(self, rank: int) -> Tensors:
        """What a silo of this rank loads for its next training."""
        received = self.algorithm.for_rank(self.algorithm.broadcast(self.theta, self.server, self.done), rank)
        return self.algorithm.local(received, {}, Place("new", self.done, 9, seed=1, rank=rank)).start()

    def mean(self, of: dict[int, dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
        """The weighted mean over the last round's silos of what their layers had added to them."""
        of = self.trained if of is None else of
        total = sum(self.weights[i] for i in of)
        return {layer: sum(self.weights[i] / total * of[i][layer] for i in of) for layer in SHAPES}  # type: ignore[misc]

    def error(self, rank: int) -> float:
        """|what a silo of this rank loads next - mean|_F / |mean of s_i B_i A_i|_F, deltas included in the first."""
        away, mean = effective(self.loaded(rank), self.adapter), self.mean()
        changes = self.mean(self.changes)
        missed = sum(float((away[layer] - mean[layer]).square().sum()) for layer in SHAPES)
        return float((missed / sum(float(change.square().sum()) for change in changes.values())) ** 0.5)
