"""The `Task` waist: a canonical row becomes token ids and a mask that says which of them are targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


class Task:
    """Turns canonical rows into sequences. Subclasses implement `pieces`."""

    name = ""

    def pieces(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Encoded]:
        """All sequences of a row (a long document gives several); empty when no target token is left.

        Raises:
            DataError: the row does not fit the task or the chat template; names the row, never quotes its text.
            ModelError: the chat template is missing or broken, whatever the row.
        """
        raise NotImplementedError

    def encode(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> Encoded | None:
        """The row's first sequence, or None when no target token is left."""
        found = self.pieces(row, tokenizer, max_length)
        return found[0] if found else None
