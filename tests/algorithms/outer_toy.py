"""A toy model with layers, trained by AdamW in silos under the rules of DiLoCo and its relatives: a network so small
that a reference loop written step by step, without rounds, can stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec

LAYERS, WIDTH, RATE = 4, 3, 0.02
Inner = Callable[[list[Parameter]], torch.optim.Optimizer]


def adamw(parameters: list[Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE)


def first() -> Tensors:
    """Names of a Llama's: embeddings, layers, the last norm."""
    generator = torch.Generator().manual_seed(5)
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.weight" for i in range(LAYERS)), "lm_head.weight"]
    return {name: torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5 for name in names}


def loss(w: dict[str, Parameter], silo: int, step: int) -> Tensor:
    """Of a batch that is the silo's own at this step of its training."""
    generator = torch.Generator().manual_seed(1000 * silo + step)
    x = torch.randn(8, WIDTH, generator=generator)
    goal = torch.sin(2 * x + silo)
    h = x @ w["model.embed_tokens.weight"]
    for i in range(LAYERS):
        h = h + torch.tanh(h @ w[f"model.layers.{i}.mlp.weight"])
    return (h @ w["lm_head.weight"] - goal).square().mean()


@dataclass
class OuterToy:
    """Rounds of an algorithm over toy silos, whose AdamW is kept between rounds.

    Attributes:
        models: the global model after every round.
    """

    spec: AlgorithmSpec
    silos: int = 3
    steps: int = 4
    inner: Inner = adamw
    models: list[Tensors] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.algorithm = get_algorithm(self.spec)
        self.theta = self.algorithm.initial(first)
        self.server = self.algorithm.init_state(self.theta)
        self.states: list[Tensors] = [{} for _ in range(self.silos)]
        self.moments: list[dict] = [{} for _ in range(self.silos)]
        self.sent: list[set[str]] = []

    def run(self, rounds: int, absent: dict[int, int] | None = None) -> OuterToy:
        """More rounds; `absent` says by round whose answer is lost."""
        for _ in range(rounds):
            number = len(self.models)
            received = self.algorithm.broadcast(self.theta, self.server, number)
            accumulator = self.algorithm.accumulator(Path())
            for silo in range(self.silos):
                if (absent or {}).get(number) == silo:
                    continue
                place = Place(f"silo-{silo}", number, 2**20, silos=self.silos)
                update, self.states[silo] = self.train(silo, received, place)
                shapes = {name: value.shape for name, value in update.items()}
                assert shapes == self.algorithm.expected_update(self.theta, place)
                self.algorithm.fold(accumulator, update, 1.0, place)
            self.sent.append(set(accumulator.total))
            step = Step(number, self.silos)
            self.theta, self.server = self.algorithm.server_step(self.theta, accumulator, self.server, step)
            self.models.append({name: value.clone() for name, value in self.theta.items()})
        return self

    def train(self, silo: int, received: Tensors, place: Place) -> tuple[Tensors, Tensors]:
        rule = self.algorithm.local(received, self.states[silo], place)
        w = {name: Parameter(value.clone()) for name, value in sorted(rule.start().items())}  # as AdamW counts them
        optimizer = self.inner(list(w.values()))
        if self.moments[silo]:
            optimizer.load_state_dict(self.moments[silo])
        for step in range(self.steps):
            rule.before(step, w)
            optimizer.zero_grad()
            loss(w, silo, place.round * self.steps + step).backward()
            rule.correct(w)
            optimizer.step()
        self.moments[silo] = optimizer.state_dict()
        return rule.finish({name: p.detach().clone() for name, p in w.items()})
