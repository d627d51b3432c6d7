"""Encoding a silo's rows once, into flat arrays that can be memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import DataError
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Task

_ARRAYS = ("ids", "loss", "offsets")


@dataclass(frozen=True)
class TokenSet(Sequence[Example]):
    """Examples: sequences end to end, `ids` int32 [tokens], `loss` bool [tokens], `offsets` int64 [sequences + 1]."""

    ids: NDArray[np.int32]
    loss: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    dropped: int = 0
    """Rows without any target token after cutting; also rows that the task or the chat template refuses, if skipped."""
    cut: int = 0
    """Rows that were longer than `max_length` and lost tokens."""
    width: int = 1
    """Sequences of an example, neighbours."""
    facts: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """By name, a number for each example."""
    left_out: int = 0
    """Examples that a selection of rows did without."""
    states: NDArray[np.float32] | None = None
    """[sequences, width], see `Example`."""
    users: NDArray[np.int64] | None = None
    """Of each example, whose it is (see `Example`); None where rows do not say."""

    def __len__(self) -> int:
        return (len(self.offsets) - 1) // self.width

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        first, last = index * self.width, (index + 1) * self.width
        ends = self.offsets[first : last + 1].tolist()
        sequences = tuple(Encoded(self.ids[start:end], self.loss[start:end]) for start, end in pairwise(ends))
        facts = {name: float(values[index]) for name, values in self.facts.items()}
        states = None if self.states is None else self.states[first:last]
        return Example(sequences, facts, states, None if self.users is None else int(self.users[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @property
    def held(self) -> int:
        """Tokens that take up memory of this process: mapped ones take none."""
        return 0 if isinstance(self.ids, np.memmap) else len(self.ids)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets[:: self.width])

    def subset(self, indices: NDArray[np.int64]) -> TokenSet:
        """These examples alone, in this order; the others are counted in `left_out`."""
        chosen = TokenSet.of((self[int(i)] for i in indices), self.dropped, self.cut)
        return replace(chosen, left_out=self.left_out + len(self) - len(chosen))

    @classmethod
    def of(cls, examples: Iterable[Example | Encoded], dropped: int = 0, cut: int = 0) -> TokenSet:
        """A set of these examples, all of one width and with the same facts; a sequence is an example of its own.

        Raises:
            DataError: some say whose they are, and others do not.
        """
        listed = [e if isinstance(e, Example) else Example((e,)) for e in examples]
        found = [sequence for example in listed for sequence in example.sequences]
        offsets = np.zeros(len(found) + 1, dtype=np.int64)
        np.cumsum([len(e) for e in found], out=offsets[1:])
        ids = np.concatenate([e.ids for e in found]) if found else np.zeros(0, np.int32)
        loss = np.concatenate([e.loss for e in found]) if found else np.zeros(0, np.bool_)
        names = list(listed[0].facts) if listed else []
        said = [e.user for e in listed if e.user is not None]
        if said and len(said) < len(listed):
            raise DataError(f"{len(listed) - len(said)} of {len(listed)} examples do not say whose they are")
        facts = {name: np.array([e.facts[name] for e in listed], np.float32) for name in names}
        return cls(
            ids.astype(np.int32, copy=False),
            loss.astype(np.bool_, copy=False),
            offsets,
            dropped,
            cut,
            len(listed[0].sequences) if listed else 1,
            facts,
            users=np.array(said, np.int64) if said else None,
        )

    def save(self, folder: Path) -> None:
        """Write the arrays as .npy files and the counts as JSON; whose examples they are is not written."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        for name, values in self.facts.items():
            np.save(folder / f"fact-{name}.npy", values, allow_pickle=False)
        counts = {"dropped": self.dropped, "cut": self.cut, "width": self.width, "facts": sorted(self.facts)}
        (folder / "counts.json").write_text(json.dumps(counts))

    @classmethod
    def load(cls, folder: Path) -> TokenSet:
        """Memory-map what `save` wrote: processes share the pages."""
        arrays = {n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in _ARRAYS}
        counts = json.loads((folder / "counts.json").read_text())
        counts.pop("sha256", None)
        facts = {n: np.load(folder / f"fact-{n}.npy", mmap_mode="r", allow_pickle=False) for n in counts.pop("facts")}
        return cls(**arrays, **counts, facts=facts)


@dataclass
class Tally:
    """What became of rows, once all are encoded; see `TokenSet`."""

    dropped: int = 0
    cut: int = 0


def encode_all(
    dataset: Iterable[dict[str, Any]],
    task: Task,
    tokenizer: Any,
    max_length: int,
    *,
    skip: bool = False,
    silo: str = "",
) -> TokenSet:
    """Encode every row into memory; see `encoded_rows`.

    Args:
        silo: whose rows they are.

    Raises:
        DataError, ModelError: see there.
    """
    tally = Tally()
    found = list(encoded_rows(dataset, task, tokenizer, max_length, skip=skip, tally=tally))
    return TokenSet.of(task.together(found, silo), tally.dropped, tally.cut)


def encoded_rows(
    dataset: Iterable[dict[str, Any]], task: Task, tokenizer: Any, max_length: int, *, skip: bool, tally: Tally
) -> Iterator[Example]:
    """The rows' examples, at least one; rows that keep no target token within `max_length` are counted as dropped.

    Args:
        dataset: canonical rows.
        task: makes sequences of them.
        tokenizer: with a chat template, where the task needs one.
        max_length: tokens per sequence.
        skip: count a row that the task or the chat template refuses as dropped, as the recipe's `malformed: skip` says.
        tally: receives the counts.

    Raises:
        DataError: a row is refused and not skipped (file and row are named), all are, or no row keeps a target.
        ModelError: the chat template is missing or broken.
    """
    rows = found = 0
    faults: list[DataError] = []
    for row in dataset:
        rows += 1
        try:
            pieces = task.examples(row, tokenizer, max_length)
        except DataError as fault:
            if not skip:
                raise
            faults.append(fault)
            pieces = []
        if owner := row.get("user"):
            pieces = [replace(piece, user=int(owner[:15], 16)) for piece in pieces]
        yield from pieces
        found += len(pieces)
        tally.dropped += not pieces
        tally.cut += any(sequence.cut for piece in pieces for sequence in piece.sequences)
    if not found:
        if rows == 0:
            raise DataError("there are no rows to train on", fix="check the source's `where`, `role` and the partition")
        if len(faults) == rows:
            raise faults[0]
        raise DataError(
            f"none of the {rows} rows keeps a target token within {max_length} tokens",
            fix="raise `training.max_length` or shorten the prompts",
        )
