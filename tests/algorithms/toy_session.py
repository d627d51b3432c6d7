"""A session on a quadratic: what rules that run their whole round may ask of their silo, with losses in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import LocalRule, Place, Step, weight_of
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec, TrainingSpec

from .quadratic import Quadratic

Maker = Callable[[list[Parameter]], torch.optim.Optimizer]


class ToySession:
    """Parameters are vectors; laid end to end in the order of `first` they are the quadratic's w."""

    def __init__(self, silo: Quadratic, first: Tensors, place: Place, steps: int, optimizer: Maker) -> None:
        self.place, self.first, self.silo, self.optimizer = place, first, silo, optimizer
        self.recipe: Any = SimpleNamespace(training=TrainingSpec(steps=steps))
        self.model: Any = None
        self.tokens: Any = range(100)
        self.trainings: list[str] = []

    def put(self, tensors: Tensors) -> dict[str, Parameter]:
        return {name: Parameter(tensors.get(name, value).clone()) for name, value in self.first.items()}

    def train(self, rule: LocalRule, *, purpose: str = "") -> tuple[Any, Tensors]:
        self.trainings.append(purpose)
        start = rule.start()
        whole = self.put(start)
        parameters = {name: p for name, p in whole.items() if rule.trains(name)}
        assert parameters.keys() <= start.keys()
        stepper = self.optimizer(list(parameters.values()))
        for step in range(self.recipe.training.steps):
            rule.before(step, parameters)
            gradient = self.silo.gradient(self.joined(whole))
            for name, part in zip(self.first, gradient.split([v.numel() for v in self.first.values()]), strict=True):
                whole[name].grad = part.clone()
            rule.correct(parameters)
            stepper.step()
        return SimpleNamespace(steps=self.recipe.training.steps), {n: p.detach().clone() for n, p in parameters.items()}

    def loss(self, tensors: Tensors, rows: int | None = None, *, alone: bool = False) -> float:  # noqa: ARG002
        away = self.joined(self.put(tensors)).double() - self.silo.b
        return float(away @ self.silo.A @ away / 2)

    def joined(self, parameters: Any) -> Tensor:
        return torch.cat([parameters[name].detach() for name in self.first])

    def should_stop(self) -> bool:
        return False

    def observe(self, event: Any) -> None:  # noqa: ARG002
        return


@dataclass
class ToyFederation:
    """Rounds over quadratic silos through `LocalRule.run`; `first` are the adapter's first values."""

    silos: Sequence[Quadratic]
    spec: AlgorithmSpec
    first: Tensors
    steps: int = 4
    optimizer: Maker = lambda parameters: torch.optim.SGD(parameters, lr=0.2)
    rounds: int = 2**30
    states: list[Tensors] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.algorithm = get_algorithm(self.spec)
        self.theta = self.algorithm.initial(lambda: {n: v.clone() for n, v in self.first.items()})
        self.server = self.algorithm.init_state(self.theta)
        self.states = [{} for _ in self.silos]
        self.done = 0
        self.figures: dict[str, Any] = {}

    def round(self, sampled: Sequence[int] | None = None) -> Tensors:
        received = self.algorithm.broadcast(self.theta, self.server, self.done)
        accumulator = self.algorithm.accumulator(Path())
        for i in range(len(self.silos)) if sampled is None else sampled:
            place = Place(f"silo-{i}", self.done, self.rounds, rank=8)
            session = ToySession(self.silos[i], self.first, place, self.steps, self.optimizer)
            outcome = self.algorithm.local(received, self.states[i], place).run(session)
            self.states[i] = outcome.state
            expected = self.algorithm.expected_update(self.theta, place)
            assert {name: value.shape for name, value in outcome.update.items()} == expected
            weight = weight_of(self.spec, {"rows": self.silos[i].weight})
            self.algorithm.fold(accumulator, outcome.update, weight, place)
        before = (self.theta, self.server)
        self.theta, self.server = self.algorithm.server_step(
            self.theta, accumulator, self.server, Step(self.done, len(self.silos))
        )
        self.figures = self.algorithm.measure(before, accumulator, (self.theta, self.server), self.done)
        self.done += 1
        return self.theta

    def loaded(self, i: int) -> Tensor:
        """What silo i measures, as the quadratic's w."""
        place = Place(f"silo-{i}", self.done, self.rounds, rank=8)
        values = self.algorithm.measured(self.algorithm.evaluated(self.theta, self.server), self.states[i], place)
        return torch.cat([values.get(name, value) for name, value in self.first.items()])
