"""The `Task` waist: rows become examples, examples a loss and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import DataError
from fedlm.recipe.schema import Recipe
from fedlm.training.objective import Figures, Likelihood, Objective, Tools
from fedlm.training.sequences import Encoded, Example

REFERENCE = "reference_"
"""Facts of this name and a number: what the reference gives that sequence of an example, in nats (`Task.compares`)."""


@dataclass(frozen=True)
class Held:
    """Held-out rows of one silo, and what they are measured with."""

    rows: Any
    """`datasets.Dataset` of canonical examples."""
    model: Any
    """In evaluation mode, without gradients."""
    tokenizer: Any
    max_length: int
    batch_tokens: int
    packing: bool = True
    skip: bool = False
    """Leave out rows that the task or the chat template refuses."""
    reference: Callable[[], AbstractContextManager[None]] | None = None
    """Inside, the model is the one that the run began with."""
    reference_logps: Callable[[Sequence[Encoded]], NDArray[np.float64]] | None = None
    """Log-probability of each sequence's targets under that model, remembered."""
    states: Callable[[Sequence[Encoded]], NDArray[np.float32]] | None = None
    """The frozen model's mean state of each sequence [sequences, width], remembered."""


@dataclass
class Measured:
    """What a task found on held-out rows."""

    figures: Figures
    """Those that its facts name, and 'loss'."""
    items: dict[str, list[Any]] = field(default_factory=dict)
    """Each row's result, for paired comparisons."""


class Task:
    """What rows are made into and what is minimised over them. Subclasses implement `examples`, or `pieces`.

    Args:
        recipe: the run's, where the task has settings of its own.
    """

    name = ""
    width = 1
    """Sequences of an example."""
    embeds = False
    """It learns from the frozen model's mean state of each sequence (`Example.states`), and reads no more of it."""
    stored = False
    """Rows may be too many for memory and are encoded into files (see `fedlm.training.stored`). The examples must then
    depend on the row, the tokenizer and `max_length` alone, and `together` is not asked."""

    def __init__(self, recipe: Recipe | None = None) -> None:
        self.recipe = recipe

    def pieces(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Encoded]:
        """All sequences of a row (a long document gives several); empty when no target token is left.

        Raises:
            DataError: the row does not fit the task or the chat template; names the row, never quotes its text.
            ModelError: the chat template is missing or broken, whatever the row.
        """
        raise NotImplementedError

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        """All examples of a row, each of `width` sequences; empty when nothing is left to learn.

        Raises:
            DataError, ModelError: as `pieces`.
        """
        return [Example((piece,)) for piece in self.pieces(row, tokenizer, max_length)]

    @property
    def compares(self) -> bool:
        """Whether its loss needs what the reference gives each sequence, as facts (`REFERENCE`)."""
        return False

    def together(self, examples: list[Example], silo: str = "") -> list[Example]:
        """All examples of a silo once more, for what a row by itself cannot know.

        Args:
            silo: whose training rows they are; held-out ones without a name.

        Raises:
            DataError: nothing can be learnt from them together.
        """
        del silo
        return examples

    def held_examples(self, held: Held) -> list[Example]:
        """The examples of all held-out rows.

        Raises:
            DataError: a row is refused, and not skipped.
        """
        found: list[Example] = []
        for row in held.rows:
            try:
                found += self.examples(dict(row), held.tokenizer, held.max_length)
            except DataError:
                if not held.skip:
                    raise
        return found

    def objective(self, tools: Tools) -> Objective:
        """What one round of one silo minimises."""
        return Likelihood(tools)

    def measure(self, held: Held) -> Measured:
        """What a model is worth on held-out rows, for tasks whose loss is no likelihood of text (see `TaskFacts`).

        Raises:
            DataError: a row is refused, and not skipped.
        """
        raise NotImplementedError
