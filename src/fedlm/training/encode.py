"""Encoding a silo's rows once, into flat arrays that can be memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import DataError
from fedlm.training.tasks.base import Encoded, Task

_ARRAYS = ("ids", "loss", "offsets")


@dataclass(frozen=True)
class TokenSet(Sequence[Encoded]):
    """Sequences end to end: `ids` int32 [tokens], `loss` bool [tokens], `offsets` int64 [sequences + 1]."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    dropped: int = 0
    """Rows without any target token after cutting; also rows that the task or the chat template refuses, if skipped."""
    cut: int = 0
    """Rows that were longer than `max_length` and lost tokens."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return Encoded(self.ids[start:end], self.loss[start:end])

    def __iter__(self) -> Iterator[Encoded]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @classmethod
    def of(cls, sequences: Iterable[Encoded], dropped: int = 0, cut: int = 0) -> TokenSet:
        found = list(sequences)
        offsets = np.zeros(len(found) + 1, dtype=np.int64)
        np.cumsum([len(e) for e in found], out=offsets[1:])
        ids = np.concatenate([e.ids for e in found]) if found else np.zeros(0, np.int32)
        loss = np.concatenate([e.loss for e in found]) if found else np.zeros(0, np.bool_)
        return cls(ids.astype(np.int32, copy=False), loss.astype(np.bool_, copy=False), offsets, dropped, cut)

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files and the counts as JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        (folder / "counts.json").write_text(json.dumps({"dropped": self.dropped, "cut": self.cut}))

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        """Memory-map what `save` wrote: processes share the pages."""
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _ARRAYS}
        return cls(**arrays, **json.loads((folder / "counts.json").read_text()))


def encode_all(
    dataset: Iterable[dict[str, Any]], task: Task, tokenizer: Any, max_length: int, *, skip: bool = False
) -> TokenSet:
    """Encode every row; rows that keep no target token within `max_length` are counted in `dropped`.

    Args:
        dataset: canonical rows.
        task: makes sequences of them.
        tokenizer: with a chat template, where the task needs one.
        max_length: tokens per sequence.
        skip: count a row that the task or the chat template refuses as dropped, as the recipe's `malformed: skip` says.

    Raises:
        DataError: a row is refused and not skipped (file and row are named), all are, or no row keeps a target.
        ModelError: the chat template is missing or broken.
    """
    found: list[Encoded] = []
    rows = dropped = cut = 0
    faults: list[DataError] = []
    for row in dataset:
        rows += 1
        try:
            pieces = task.pieces(row, tokenizer, max_length)
        except DataError as fault:
            if not skip:
                raise
            faults.append(fault)
            pieces = []
        found += pieces
        dropped += not pieces
        cut += any(piece.cut for piece in pieces)
    if not found:
        if rows == 0:
            raise DataError("there are no rows to train on", fix="check the source's `where`, `role` and the partition")
        if len(faults) == rows:
            raise faults[0]
        raise DataError(
            f"none of the {rows} rows keeps a target token within {max_length} tokens",
            fix="raise `training.max_length` or shorten the prompts",
        )
    return TokenSet.of(found, dropped, cut)
