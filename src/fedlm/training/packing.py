"""Packing: sequences lie end to end in one row without padding, and what several begin with is computed once.

A batch is a forest of *segments*, runs of tokens. A segment's parent is the segment it continues; sequences that begin
with the same tokens (a system prompt, a question with several answers) share their first segments. A token's hidden
state depends on its ancestors alone, so every sequence gets exactly the logits it would get by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlm.training.sequences import Encoded

MIN_SHARED = 8
"""A common beginning shorter than this is computed for each sequence: splitting it off costs more than it saves."""

WASTE = 1.3
"""Segments attend together, padded to one length, while that computes at most this many times the cells they need."""


@dataclass(frozen=True)
class Grid:
    """Segments with the same ancestors that attend in one call, padded to one length Q.

    Query i of a segment sees all P ancestors and the segment's keys 0..i, so one causal mask [Q, P + Q] serves all, and
    padding at the end is in everyone's future.
    """

    ancestors: Tensor
    """int64 [P]: rows of the packed batch."""
    rows: Tensor
    """int64 [n * Q]: the segments' rows; padding repeats a segment's first row."""
    valid: Tensor
    """int64 [tokens]: where in `rows` the real ones are."""
    padding: Tensor
    """int64: where in `rows` the others are."""
    segments: int

    @property
    def length(self) -> int:
        return len(self.rows) // self.segments

    def to(self, device: torch.device) -> Grid:
        names = ("ancestors", "rows", "valid", "padding")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass
class Packed:
    """One packed row of T tokens, its targets, and its attention layout."""

    ids: Tensor
    """int64 [1, T]"""
    positions: Tensor
    """int64 [1, T]"""
    predictors: Tensor
    """int64 [M]: the row whose hidden state predicts each target."""
    targets: Tensor
    """int64 [M]"""
    owners: Tensor
    """int64 [M]: the sequence each target belongs to."""
    ends: Tensor
    """int64 [sequences]: the row of each sequence's last token that is read."""
    grids: list[Grid]
    places: Tensor
    """int64 [T]: where each row is in the grids' rows laid end to end."""
    sequences: int
    tokens: int
    """Tokens of all sequences, shared ones counted for each: at least T."""

    def to(self, device: torch.device) -> Packed:
        if device.type == "cpu":
            return self
        moved = [grid.to(device) for grid in self.grids]
        names = ("ids", "positions", "predictors", "targets", "owners", "ends", "places")
        return replace(self, grids=moved, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass
class _Segment:
    tokens: NDArray[np.int32]
    start: int
    """Its first row in the packed batch."""
    position: int
    """Its first token's position in the sequence."""
    ancestors: NDArray[np.int64]
    """Rows of everything before it in its sequences."""

    @property
    def rows(self) -> NDArray[np.int64]:
        return np.arange(self.start, self.start + len(self.tokens), dtype=np.int64)


def pack(sequences: Sequence[Encoded], *, share: bool = True) -> Packed:
    """Lay out sequences (each of at least one token) as one row; `share=False` computes every token of each.

    A sequence is read up to its last target, which is predicted and never read; without targets it is read whole.
    """
    read = [s.ids[: max(1, np.flatnonzero(s.loss)[-1])] if s.loss.any() else s.ids for s in sequences]
    order = sorted(range(len(read)), key=lambda i: read[i].astype(">i4").tobytes())
    segments: list[_Segment] = []
    paths: dict[int, NDArray[np.int64]] = {}
    total = 0

    def emit(tokens: NDArray[np.int32], position: int, ancestors: NDArray[np.int64]) -> NDArray[np.int64]:
        nonlocal total
        segment = _Segment(tokens, total, position, ancestors)
        segments.append(segment)
        total += len(tokens)
        return np.concatenate([ancestors, segment.rows])

    def grow(members: list[int], depth: int, ancestors: NDArray[np.int64]) -> None:
        """Emit the segments of sequences that agree on their first `depth` tokens, whose rows are `ancestors`."""
        first, last = read[members[0]], read[members[-1]]
        common = _common(first, last)  # sorted: what the outermost share, all share
        if not share:
            for i in members:
                paths[i] = emit(read[i], 0, ancestors)
            return
        if common == len(first) == len(last):  # one sequence, or equal ones
            path = emit(first[depth:], depth, ancestors) if common > depth else ancestors
            for i in members:
                paths[i] = path
            return
        if common - depth >= MIN_SHARED:
            ancestors = emit(first[depth:common], depth, ancestors)
            depth = common
        groups: list[list[int]] = []
        for i in members:  # neighbours that share more than the whole group does
            begins = groups and _common(read[groups[-1][0]], read[i]) > max(common, depth)
            if begins:
                groups[-1].append(i)
            else:
                groups.append([i])
        for group in groups:
            grow(group, depth, ancestors)

    grow(order, 0, np.zeros(0, np.int64))
    predictors, targets, owners = [], [], []
    for i, sequence in enumerate(sequences):
        where = np.flatnonzero(sequence.loss)
        predictors.append(paths[i][where - 1])
        targets.append(sequence.ids[where].astype(np.int64))
        owners.append(np.full(len(where), i, np.int64))
    grids = [_grid(group) for group in _groups(segments)]
    starts = np.cumsum([0, *(len(g.rows) for g in grids)])
    places = np.empty(total, np.int64)
    for start, grid in zip(starts, grids, strict=False):
        places[grid.rows[grid.valid].numpy()] = start + grid.valid.numpy()
    positions = np.concatenate([s.position + np.arange(len(s.tokens)) for s in segments])
    return Packed(
        ids=torch.from_numpy(np.concatenate([s.tokens for s in segments]).astype(np.int64))[None],
        positions=torch.from_numpy(positions)[None],
        predictors=torch.from_numpy(np.concatenate(predictors)),
        targets=torch.from_numpy(np.concatenate(targets)),
        owners=torch.from_numpy(np.concatenate(owners)),
        ends=torch.tensor([int(paths[i][-1]) for i in range(len(sequences))]),
        grids=grids,
        places=torch.from_numpy(places),
        sequences=len(sequences),
        tokens=sum(len(s) for s in sequences),
    )


def _common(a: NDArray[np.int32], b: NDArray[np.int32]) -> int:
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def _groups(segments: list[_Segment]) -> list[list[_Segment]]:
    """Children of one parent together, of similar length, so that padding wastes little."""
    groups: list[list[_Segment]] = []
    needed = 0

    def kin(s: _Segment) -> tuple[int, int]:
        return (len(s.ancestors), int(s.ancestors[-1]) if len(s.ancestors) else -1)

    for segment in sorted(segments, key=lambda s: (kin(s), -len(s.tokens), s.start)):
        q, k = len(segment.tokens), len(segment.ancestors) + len(segment.tokens)
        if groups and kin(groups[-1][0]) == kin(segment):
            wide = len(groups[-1][0].tokens)
            if (len(groups[-1]) + 1) * wide * (k - q + wide) <= WASTE * (needed + q * k):
                groups[-1].append(segment)
                needed += q * k
                continue
        groups.append([segment])
        needed = q * k
    return groups


def _grid(segments: list[_Segment]) -> Grid:
    wide = len(segments[0].tokens)
    rows = np.stack([np.where(np.arange(wide) < len(s.tokens), s.start + np.arange(wide), s.start) for s in segments])
    real = np.arange(wide) < np.array([[len(s.tokens)] for s in segments])
    return Grid(
        ancestors=torch.from_numpy(segments[0].ancestors),
        rows=torch.from_numpy(rows.reshape(-1)),
        valid=torch.from_numpy(np.flatnonzero(real)),
        padding=torch.from_numpy(np.flatnonzero(~real)),
        segments=len(segments),
    )
