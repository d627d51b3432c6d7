"""What local training minimises: an `Objective` turns the examples of an optimiser step into a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.forward import batch_nll, by_tokens
from fedlm.training.sequences import Encoded, Example

Figures = dict[str, tuple[float, float]]
"""By name (see `fedlm.recipe.tasks.FIGURES`), a sum and what it is divided by; those of several silos add up."""


@dataclass(frozen=True)
class Tools:
    """What an objective may use of its silo's bench during one round."""

    model: Module
    spec: TrainingSpec
    tokenizer: Any = None
    reference: Callable[[], AbstractContextManager[None]] | None = None
    """Inside, the model computes what it computed when the run began; for tasks that compare with that."""
    key: tuple[str | int, ...] = ()
    """(seed, silo, ..., round) of all draws."""


class Objective:
    """The loss of one silo's optimiser steps in one round.

    A step calls `begin` once with its examples and then `terms` for each forward pass's share of what that returned.
    """

    def __init__(self, tools: Tools) -> None:
        self.tools = tools
        self.figures: Figures = {}
        """Of all steps so far."""

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        """A step begins: what needs all of its examples is found here. Returns the examples that are trained on."""
        return list(examples)

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        """Terms [n] (fp32, differentiable) and a divisor. The step's loss is the sum of `terms.sum() / divisor` over
        its forward passes; the divisor is the whole step's."""
        raise NotImplementedError

    def count(self, name: str, total: float, number: float) -> None:
        """Add to a figure."""
        before = self.figures.get(name, (0.0, 0.0))
        self.figures[name] = (before[0] + total, before[1] + number)


class Likelihood(Objective):
    """Negative log-likelihood of the targets, divided by their number in the whole step."""

    targets = 0

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        self.targets = sum(e.targets for e in examples)
        return list(examples)

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        return batch_nll(self.tools.model, sequences_of(part), self.tools.spec), self.targets


@torch.no_grad()
def mean_loss(objective: Objective, examples: Sequence[Example], batch_tokens: int) -> float:
    """The objective over all these examples as one step, without gradients or dropout.

    Args:
        batch_tokens: tokens per forward pass; an example is never cut.
    """
    model, packing = objective.tools.model, objective.tools.spec.packing
    training = model.training
    model.eval()
    try:
        with packed(model) if packing else nullcontext():
            chosen = objective.begin(examples)
            total = divisor = 0.0
            for run in by_tokens([len(e) for e in chosen], batch_tokens):
                terms, divisor = objective.terms([chosen[i] for i in run])
                total += float(terms.sum(dtype=torch.float64))
    finally:
        model.train(training)
    return total / divisor


def sequences_of(examples: Sequence[Example]) -> list[Encoded]:
    """All sequences of these examples, in order."""
    return [sequence for example in examples for sequence in example.sequences]
