"""A silo's part in training a tokenizer: how often which symbols are neighbours in its words, after given merges.

The verb 'pairs'. A request carries all merges so far and names rows and columns of the table of pairs; the answer is
those lines of this silo's table, as whole numbers in a fixed layout: no word, no text, and nothing that could not be
summed under masks. It is a function of the silo's training rows and the request alone. So a repeat is answered alike,
and a silo that was restarted, or lost its place, builds its table again from the merges.

Request, tensors: `merges` int32 [merges, 2], `rows` int32 [r], `columns` int32 [c]. Reply: `rows` int32 [r, symbols],
`columns` int32 [c, symbols]; entry y of row x, and entry x of column y, is how often y follows x.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import DataError
from fedlm.messages import Tensors
from fedlm.models.bpe import Symbols, alphabet, word_counts

Counts = NDArray[np.int32]

HELD = 50_000_000
"""Symbols of tables that stay in memory (12 bytes each); those used longest ago are built again when needed."""

MOST_SYMBOLS = 1 << 16
"""No vocabulary is larger: a request for more would only cost time."""

LONGEST_SYMBOL = 1024
"""Letters: each merge may double them, so that a few dozen numbers would ask for more memory than there is."""

MOST_CELLS = 1 << 30
"""Of one answer: all lines of the largest vocabulary that a coordinator trains."""

MOST = 2**31 - 1
"""Of one pair in one silo; counts travel as int32."""

_BOUNDARY = -1


class PairTable:
    """One silo's words as symbols, after the merges so far.

    Each distinct word stands once, between boundaries, in `symbols` int32; `counts` int64 says how often its word
    occurs.
    """

    def __init__(self, words: Mapping[str, int]) -> None:
        numbers = {letter: number for number, letter in enumerate(alphabet())}
        ordered = sorted(words)
        lengths = np.array([len(word) + 1 for word in ordered], dtype=np.int64)
        flat = [_BOUNDARY]
        for word in ordered:
            flat += [numbers[letter] for letter in word]
            flat.append(_BOUNDARY)
        self.symbols = np.array(flat, dtype=np.int32)
        occurs = np.array([words[word] for word in ordered], dtype=np.int64)
        self.counts = np.concatenate([np.zeros(1, np.int64), np.repeat(occurs, lengths)])
        self.known, self.merges = Symbols(), np.zeros((0, 2), np.int32)

    def begins(self, merges: NDArray[np.int32]) -> bool:
        """Whether the merges applied here are the first of these."""
        return np.array_equal(self.merges, merges[: len(self.merges)])

    def follow(self, merges: NDArray[np.int32]) -> None:
        """Apply those merges that have not been applied; the others are the same (`begins`).

        Raises:
            DataError: one is of symbols that there are not.
        """
        for left, right in merges[len(self.merges) :].tolist():
            if not 0 <= min(left, right) <= max(left, right) < len(self.known):
                raise DataError("a request for pairs merges symbols that there are not")
            if len(self.known.strings[left]) + len(self.known.strings[right]) > LONGEST_SYMBOL:
                raise DataError(f"a request for pairs merges symbols into one of more than {LONGEST_SYMBOL} letters")
            self._merge(left, right, self.known.add(left, right))
            self.merges = np.concatenate([self.merges, np.array([[left, right]], np.int32)])

    def _merge(self, left: int, right: int, made: int) -> None:
        """Put `made` in the place of each (left, right), in every word from its beginning."""
        at = np.flatnonzero(self.symbols == left)
        at = at[self.symbols[at + 1] == right]  # the last symbol is a boundary, so there is always a next one
        if left == right and len(at):  # in a run of one symbol, every second pair
            begins = np.concatenate([[True], np.diff(at) != 1])
            run = at[begins][np.cumsum(begins) - 1]
            at = at[(at - run) % 2 == 0]
        if not len(at):
            return
        self.symbols[at] = made
        keep = np.ones(len(self.symbols), dtype=np.bool_)
        keep[at + 1] = False
        self.symbols, self.counts = self.symbols[keep], self.counts[keep]

    def row(self, symbol: int) -> Counts:
        """How often each symbol follows this one, int32 [symbols]."""
        at = np.flatnonzero(self.symbols == symbol)
        return self._sums(self.symbols[at + 1], self.counts[at])

    def column(self, symbol: int) -> Counts:
        """How often this one follows each symbol, int32 [symbols]."""
        at = np.flatnonzero(self.symbols == symbol)
        return self._sums(self.symbols[at - 1], self.counts[at])  # the first symbol is a boundary

    def _sums(self, neighbours: NDArray[np.int32], counts: NDArray[np.int64]) -> Counts:
        inside = neighbours != _BOUNDARY
        # bincount adds in float64: exact below 2**53 occurrences
        sums = np.bincount(neighbours[inside], weights=counts[inside], minlength=len(self.known))
        if sums.max() > MOST:
            raise DataError(f"a pair of symbols occurs more than {MOST} times, more than a count may hold")
        return sums.astype(np.int32)


class PairTables:
    """The tables of the silos of one process."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, PairTable] = OrderedDict()

    def answer(self, silo: str, rows: Any, kind: str, tensors: Tensors) -> Tensors:
        """The reply to a request (see above).

        Args:
            rows: the silo's training rows.
            kind: their form (see `fedlm.data.examples`).

        Raises:
            DataError: the request is none.
        """
        merges, lines = checked(tensors)
        table = self._held.pop(silo, None)
        if table is None or not table.begins(merges):
            table = PairTable(word_counts(texts_of(rows, kind)))
        self._held[silo] = table
        table.follow(merges)
        while len(self._held) > 1 and sum(len(t.symbols) for t in self._held.values()) > HELD:
            self._held.popitem(last=False)
        for ids in lines.values():
            if len(ids) and not 0 <= ids.min() <= ids.max() < len(table.known):
                raise DataError("a request for pairs names a line that there is not")
        if sum(map(len, lines.values())) * len(table.known) > MOST_CELLS:
            raise DataError("a request for pairs asks for more lines than there is room for")
        read = {"rows": table.row, "columns": table.column}
        empty = np.zeros((0, len(table.known)), np.int32)
        found = {name: [read[name](i) for i in ids.tolist()] for name, ids in lines.items()}
        return {name: torch.from_numpy(np.stack(each) if each else empty) for name, each in found.items()}


def checked(tensors: Tensors) -> tuple[NDArray[np.int32], dict[str, NDArray[np.int32]]]:
    """What a request asks: merges [m, 2], and by 'rows' and 'columns' the symbols of the lines.

    Raises:
        DataError: a tensor is missing or has another form, or a line is named twice.
    """
    if tensors.keys() != {"merges", "rows", "columns"} or any(t.dtype is not torch.int32 for t in tensors.values()):
        raise DataError("a request for pairs holds int32 `merges`, `rows` and `columns`")
    merges, lines = tensors["merges"], {name: tensors[name] for name in ("rows", "columns")}
    if merges.ndim != 2 or merges.shape[1] != 2 or len(merges) > MOST_SYMBOLS:
        raise DataError(f"`merges` must be [m, 2] with at most {MOST_SYMBOLS} of them")
    if any(line.ndim != 1 or len(set(line.tolist())) != len(line) for line in lines.values()):
        raise DataError("`rows` and `columns` must be lists that name a line once")
    return merges.numpy(), {name: line.numpy() for name, line in lines.items()}


def texts_of(rows: Iterable[dict[str, Any]], kind: str) -> Iterator[str]:
    """The texts of canonical rows that a tokenizer will meet."""
    for row in rows:
        if kind == "messages":
            yield from (message["content"] for message in row["messages"])
        elif kind in ("choice", "opinion"):
            yield from (row["question"], *row["choices"])
        elif kind == "preference":
            yield from (row["prompt"], row["chosen"], row["rejected"])
        else:
            yield row["text"]
