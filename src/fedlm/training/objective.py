"""What local training minimises: an `Objective` turns the examples of an optimiser step into a loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from fedlm.recipe.schema import TrainingSpec
from fedlm.training.forward import batch_nll
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


def sequences_of(examples: Sequence[Example]) -> list[Encoded]:
    """All sequences of these examples, in order."""
    return [sequence for example in examples for sequence in example.sequences]
