"""Updates that wait one by one until the server's step: for rules that are no function of the updates' sum.

They lie in one file without a name in the spool folder, fp32, tensor after tensor, and are read back a few tensors of
every silo at a time: memory holds what is asked for, whatever the number of silos. A first few MB stay in memory, so
that small federations touch no disk.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Place
from fedlm.errors import RunError
from fedlm.messages import Tensors

HELD_BYTES = 64 * 2**20
"""Updates are kept in memory up to this many bytes together; further ones wait on disk."""

Layout = dict[str, tuple[int, torch.Size]]
"""By name, in sorted order: where a tensor begins in its update (in elements), and its shape."""


@dataclass(frozen=True)
class Kept:
    """One silo's update: its weight, where it was made, and where it lies."""

    weight: float
    place: Place
    layout: Layout
    held: Tensor | None
    """All of it as one vector, or None when it is in the file."""
    offset: int
    """Its first byte in the file."""


class Stored(Accumulator):
    """Every update by itself, in the order in which they were folded.

    Args:
        spool: a folder on a disk with room for the round's updates.
        summed: also keep their weighted sum, as `Accumulator` does; needs updates of equal shapes.
    """

    def __init__(self, spool: Path, *, summed: bool, held_bytes: int = HELD_BYTES) -> None:
        super().__init__()
        self.kept: list[Kept] = []
        self._spool, self._summed, self._room = spool, summed, held_bytes
        self._file: IO[bytes] | None = None
        self._end = 0
        self._layouts: dict[tuple[tuple[str, torch.Size], ...], Layout] = {}

    def keep(self, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        """Store an update.

        Raises:
            RunError: the disk is full or the folder cannot be written.
        """
        if self._summed:
            self.add(update, weight)
        else:
            self.weight += weight
            self.count += 1
        layout = self._layout({name: update[name].shape for name in sorted(update)})
        whole = torch.empty(sum(shape.numel() for _, shape in layout.values()))
        for name, (start, shape) in layout.items():
            whole[start : start + shape.numel()].view(shape).copy_(update[name])  # fp32, whatever arrived
        offset = self._end
        if whole.nbytes <= self._room:
            self._room -= whole.nbytes
            self.kept.append(Kept(weight, place, layout, whole, 0))
            return
        self._write(whole)
        self.kept.append(Kept(weight, place, layout, None, offset))

    def read(self, names: Sequence[str]) -> Iterator[tuple[Kept, Tensors]]:
        """By silo, in canonical order, those of these tensors that its update has (fp32); silos without any are left
        out. Names that follow each other in sorted order are read at once.

        Values are views into memory that the accumulator keeps: change none in place.
        """
        for kept in self.kept:
            found = sorted(name for name in names if name in kept.layout)
            if found:
                yield kept, self._tensors(kept, found)

    def read_together(self, names: Sequence[str], ranks: int) -> Iterator[tuple[list[Kept], Tensors]]:
        """As `read`, with several silos at once: those that follow each other with updates of one layout and rank, as
        many as make up `ranks`. Values have a first dimension more, and are copies."""
        for (_, rank), alike in groupby(self.kept, key=lambda kept: (id(kept.layout), kept.place.rank)):
            silos = list(alike)
            found = sorted(name for name in names if name in silos[0].layout)
            most = max(1, ranks // max(rank, 1))
            for start in range(0, len(silos) if found else 0, most):
                yield silos[start : start + most], self._together(silos[start : start + most], found)

    def spans(self, names: Sequence[str], size: int) -> Iterator[tuple[int, int]]:
        """Where these tensors lie in an update, in elements from its beginning, in parts of at most `size`; those that
        lie side by side make one span.

        Raises:
            RunError: the updates are not laid out alike.
        """
        if len({id(kept.layout) for kept in self.kept}) > 1:
            raise RunError("the updates are not of the same tensors and shapes, so they cannot be compared")
        runs: list[tuple[int, int]] = []
        for name in sorted(names):
            start, end = self.kept[0].layout[name][0], _end(self.kept[0].layout[name])
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((start, end))
        for start, end in runs:
            for first in range(start, end, size):
                yield first, min(first + size, end)

    def block(self, start: int, end: int, among: Sequence[int] | None = None) -> Tensor:
        """These elements of every update, or of those of these numbers: [n, end - start], fp32, a copy."""
        chosen = self.kept if among is None else [self.kept[i] for i in among]
        block = torch.empty(len(chosen), end - start)
        for row, kept in zip(block, chosen, strict=True):
            self._fill(row, kept, start)
        return block

    def weight_of(self, names: Sequence[str]) -> float:
        """The weights together of the silos whose update has any of these tensors."""
        return sum(kept.weight for kept in self.kept if any(name in kept.layout for name in names))

    def _layout(self, shapes: dict[str, torch.Size]) -> Layout:
        """One object for all updates that are laid out alike."""
        key = tuple(shapes.items())
        if key not in self._layouts:
            layout, start = {}, 0
            for name, shape in shapes.items():
                layout[name] = (start, shape)
                start += shape.numel()
            self._layouts[key] = layout
        return self._layouts[key]

    def _write(self, whole: Tensor) -> None:
        try:
            if self._file is None:
                self._spool.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._spool, buffering=0)  # noqa: SIM115
            view = whole.numpy().data.cast("B")
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RunError(
                f"updates cannot wait on disk ({'it is full' if full else error.strerror})",
                where=str(self._spool),
                fix="free space there and continue with --resume",
            ) from error
        self._end += whole.nbytes

    def _tensors(self, kept: Kept, names: list[str]) -> Tensors:
        """These tensors of one update: the span from the first to the last is read in one go if nothing else is
        between them, else each by itself."""
        places = [kept.layout[name] for name in names]
        sizes = [shape.numel() for _, shape in places]
        first, end = places[0][0], places[-1][0] + sizes[-1]
        if end - first == sum(sizes):
            span = self._span(kept, first, end)
            return {
                name: span[start - first : start - first + shape.numel()].view(shape)
                for name, (start, shape) in zip(names, places, strict=True)
            }
        return {
            name: self._span(kept, start, start + shape.numel()).view(shape)
            for name, (start, shape) in zip(names, places, strict=True)
        }

    def _together(self, silos: Sequence[Kept], names: list[str]) -> Tensors:
        """As `_tensors`, of several updates of one layout."""
        found: Tensors = {}
        runs: list[list[str]] = []
        for name in names:  # tensors that lie side by side are read at once
            start, _ = silos[0].layout[name]
            if runs and _end(silos[0].layout[runs[-1][-1]]) == start:
                runs[-1].append(name)
            else:
                runs.append([name])
        for run in runs:
            first, end = silos[0].layout[run[0]][0], _end(silos[0].layout[run[-1]])
            block = torch.empty(len(silos), end - first)
            for row, kept in zip(block, silos, strict=True):
                self._fill(row, kept, first)
            for name in run:
                start, shape = silos[0].layout[name]
                found[name] = block[:, start - first : start - first + shape.numel()].view(len(silos), *shape)
        return found

    def _span(self, kept: Kept, start: int, end: int) -> Tensor:
        if kept.held is not None:
            return kept.held[start:end]
        span = torch.empty(end - start)
        self._fill(span, kept, start)
        return span

    def _fill(self, span: Tensor, kept: Kept, start: int) -> None:
        """Copy what begins at this element of an update."""
        if kept.held is not None:
            span.copy_(kept.held[start : start + len(span)])
            return
        assert self._file is not None
        view, at = span.numpy().data.cast("B"), kept.offset + 4 * start
        while view:
            count = os.preadv(self._file.fileno(), [view], at)
            if count == 0:
                raise RunError("updates that waited on disk are cut short", where=str(self._spool))
            view, at = view[count:], at + count


def _end(place: tuple[int, torch.Size]) -> int:
    return place[0] + place[1].numel()
