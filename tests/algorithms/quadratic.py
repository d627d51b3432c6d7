"""Silos whose loss is a quadratic with a known minimiser, and rounds over them, so that results have closed forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Algorithm, Place, Step, weight_of
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec


@dataclass
class Quadratic:
    """f(w) = (w - b)' A (w - b) / 2 over w = two tensors laid end to end."""

    A: Tensor
    b: Tensor
    weight: float = 1.0

    def gradient(self, w: Tensor) -> Tensor:
        return self.A.to(w.dtype) @ (w - self.b.to(w.dtype))


def quadratics(silos: int, seed: int = 0, dimension: int = 6) -> list[Quadratic]:
    """Well-conditioned (eigenvalues 0.4 .. 1.6), unlike one another, with weights 1, 2, 3 ..."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(silos):
        basis, _ = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64))
        eigenvalues = torch.rand(dimension, generator=generator, dtype=torch.float64) * 1.2 + 0.4
        b = torch.randn(dimension, generator=generator, dtype=torch.float64) * 0.5
        made.append(Quadratic(basis @ eigenvalues.diag() @ basis.T, b, float(i + 1)))
    return made


def to_tensors(w: Tensor) -> Tensors:
    """A vector of six as two parameters."""
    return {"layer.a": w[:2].float().clone(), "layer.b": w[2:].view(2, 2).float().clone()}


def to_vector(tensors: Tensors) -> Tensor:
    return torch.cat([tensors["layer.a"].flatten(), tensors["layer.b"].flatten()])


def sgd(rate: float) -> Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def train(
    algorithm: Algorithm,
    received: Tensors,
    silo_state: Tensors,
    silo: Quadratic,
    *,
    steps: int,
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    place: Place | None = None,
) -> tuple[Tensors, Tensors, list[Tensor]]:
    """One silo's round: (update, state, the uncorrected gradient of every step)."""
    rule = algorithm.local(received, silo_state, place or Place())
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in rule.start().items()}
    stepper = optimizer(list(parameters.values()))
    gradients = []
    for step in range(steps):
        rule.before(step, parameters)
        gradient = silo.gradient(to_vector({name: p.detach() for name, p in parameters.items()}))
        gradients.append(gradient)
        for name, value in to_tensors(gradient).items():
            parameters[name].grad = value
        rule.correct(parameters)
        stepper.step()
    update, state = rule.finish({name: p.detach().clone() for name, p in parameters.items()})
    return update, state, gradients


@dataclass
class Federation:
    """Rounds over quadratic silos."""

    silos: Sequence[Quadratic]
    spec: AlgorithmSpec
    steps: int = 4
    rate: float = 0.2
    optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None
    theta: Tensors = field(default_factory=lambda: to_tensors(torch.zeros(6)))

    def __post_init__(self) -> None:
        self.algorithm = get_algorithm(self.spec)
        self.state = self.algorithm.init_state(self.theta)
        self.done = 0
        self.silo_states: list[Tensors] = [{} for _ in self.silos]

    def round(self, sampled: Sequence[int] | None = None) -> Tensor:
        """One round over the sampled silos; the new global model as a vector."""
        received = self.algorithm.broadcast(self.theta, self.state, self.done)
        accumulator = self.algorithm.accumulator(Path())
        for i in range(len(self.silos)) if sampled is None else sampled:
            place = Place(f"silo-{i}", self.done, 2**30, silos=len(self.silos))
            update, self.silo_states[i], _ = train(
                self.algorithm,
                received,
                self.silo_states[i],
                self.silos[i],
                steps=self.steps,
                optimizer=self.optimizer or sgd(self.rate),
                place=place,
            )
            self.algorithm.fold(accumulator, update, weight_of(self.spec, {"rows": self.silos[i].weight}), place)
        self.theta, self.state = self.algorithm.server_step(
            self.theta, accumulator, self.state, Step(self.done, len(self.silos))
        )
        self.done += 1
        return to_vector(self.theta)
