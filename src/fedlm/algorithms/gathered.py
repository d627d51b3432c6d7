"""A round's updates for a rule against bad silos: one by one, or as means of random groups of silos."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fedlm.algorithms.base import Place
from fedlm.algorithms.stored import HELD_BYTES, Kept, Stored
from fedlm.errors import RunError
from fedlm.messages import Fields
from fedlm.randomness import numpy_generator


class Gathered(Stored):
    """Every update by itself."""

    def __init__(self, spool: Path) -> None:
        super().__init__(spool, summed=False)
        self.figures: Fields = {}
        """What the server's step tells of the round."""

    def deal(self, silos: Sequence[str], place: Place) -> None:
        """Told before the round which silos it is of."""

    def complete(self) -> None:
        """Nothing more will come: from here on `kept` is what the rule sees."""


class Grouped(Gathered):
    """Means of random groups of silos: a silo's update is added to its group's sum and never kept.

    Who is in a group is drawn for every round, by the run's seed, among the silos that were asked (after Karimireddy et
    al., ICLR 2022, whose buckets are dealt among those that answered; a sum under masks needs its group before). f bad
    silos spoil at most f groups, and the honest groups' means lie nearer together than the silos' updates: their
    variance is divided by the size of a group.

    A group's mean is weighted by the silos' weights, and a group counts for its silos' weights together. A group from
    which nobody answered does not exist.
    """

    def __init__(self, spool: Path, groups: int, *, held_bytes: int = HELD_BYTES) -> None:
        super().__init__(spool)
        self._groups, self._held_bytes = groups, held_bytes
        self._of: dict[str, int] = {}
        self._place = Place()
        self._sums: Tensor | None = None
        self._weights = [0.0] * groups
        self._members: list[list[str]] = [[] for _ in range(groups)]
        self._memory: IO[bytes] | None = None

    def deal(self, silos: Sequence[str], place: Place) -> None:
        self._of, self._place = partition(silos, self._groups, place.seed, place.round), place

    def keep(self, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        """Add an update to its group's sum.

        Raises:
            RunError: the groups were not dealt to this silo, updates differ in shape, or the disk is full.
        """
        if place.silo not in self._of:
            raise RunError(f"'{place.silo}' is in no group of this round")
        layout = self._layout({name: update[name].shape for name in sorted(update)})
        size = sum(shape.numel() for _, shape in layout.values())
        if self._sums is None:
            self._sums = self._zeros(size)
        if len(self._layouts) > 1:
            raise RunError("the updates are not of the same tensors and shapes, so they cannot be added up")
        group = self._of[place.silo]
        for name, (start, shape) in layout.items():
            part = self._sums[group, start : start + shape.numel()]
            part.add_(update[name].reshape(-1).to(torch.float32), alpha=weight)
        self._weights[group] += weight
        self._members[group].append(place.silo)
        self.weight += weight
        self.count += 1

    def complete(self) -> None:
        if self._sums is None or self.kept:
            return
        (layout,) = self._layouts.values()
        for group, (total, weight) in enumerate(zip(self._sums, self._weights, strict=True)):
            if weight > 0:
                here = Place(f"group-{group}", self._place.round, self._place.rounds, self._place.seed)
                self.kept.append(Kept(weight, here, layout, total.div_(weight), 0))
        self.figures["groups"] = {f"group-{i}": members for i, members in enumerate(self._members) if members}

    def _zeros(self, size: int) -> Tensor:
        """Zeros [groups, size]; in a file without a name where they are large, of which memory holds what is in use."""
        shape = (self._groups, size)
        if 4 * self._groups * size <= self._held_bytes:
            return torch.zeros(shape)
        try:
            self._spool.mkdir(parents=True, exist_ok=True)
            self._memory = tempfile.TemporaryFile(dir=self._spool)  # noqa: SIM115
            os.posix_fallocate(self._memory.fileno(), 0, 4 * self._groups * size)  # a full disk is found here
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise RunError(
                f"the groups' sums have no room on disk ({'it is full' if full else error.strerror})",
                where=str(self._spool),
                fix="free space there and continue with --resume",
            ) from error
        return torch.from_numpy(np.memmap(self._memory, dtype=np.float32, mode="r+", shape=shape))


def partition(silos: Sequence[str], groups: int, seed: int, round_: int) -> dict[str, int]:
    """The group of each silo: all partitions into groups whose sizes differ by at most one are equally likely."""
    order = numpy_generator(seed, "groups", round_).permutation(len(silos))
    return {silos[int(silo)]: position % groups for position, silo in enumerate(order)}
