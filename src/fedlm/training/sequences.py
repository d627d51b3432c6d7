"""Sequences of token ids with a mask of their targets, and examples: what one step of training is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Encoded:
    """One training sequence. `loss[i]` means token i is a target, predicted from tokens before it; loss[0] is False."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    cut: bool = False
    """The row was longer than `max_length` and lost tokens."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        return int(self.loss.sum())


def encoded(ids: list[int], loss: list[bool], max_length: int) -> Encoded | None:
    """Cut to `max_length`, then drop what follows the last target, which no loss depends on. None without a target."""
    cut = len(ids) > max_length
    mask = np.asarray(loss[:max_length], dtype=np.bool_)
    if len(mask):
        mask[0] = False  # nothing precedes it
    where = np.flatnonzero(mask)
    if len(where) == 0:
        return None
    end = int(where[-1]) + 1
    return Encoded(np.asarray(ids[:end], dtype=np.int32), mask[:end], cut)


@dataclass(frozen=True)
class Example:
    """What a task learns from at once: one sequence, or several that belong together, such as a pair of answers."""

    sequences: tuple[Encoded, ...]
    facts: Mapping[str, float] = field(default_factory=dict)
    """Numbers about it that its task knows beforehand, such as a label."""
    states: NDArray[np.float32] | None = None
    """[sequences, width]: the frozen model's mean state of each sequence, for tasks that read no more of it."""
    user: int | None = None
    """Whose row it is of, as a number from a hash; None where rows do not say."""

    def __len__(self) -> int:
        return sum(len(s) for s in self.sequences)

    @property
    def targets(self) -> int:
        return sum(s.targets for s in self.sequences)
