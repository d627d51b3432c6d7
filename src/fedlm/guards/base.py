"""The `Guard` waist: what happens to an update on its way between a silo and the coordinator.

A guard turns numbers into *parts*, the tensors that travel, and perhaps into fewer or other numbers, which it leaves to
the next guard of the chain (`fedlm.guards.chain`): top-k sends where the largest values are and leaves the values,
which int4 then sends in four bits each. Whoever decodes knows which names and shapes an update must have, so neither
travels, and every part's type and length is known before it is looked at.

Numbers are one fp32 vector: all tensors of an update end to end, in sorted order of their names. Hundreds of small
matrices would cost more in calls than in arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import UpdateRefused
from fedlm.messages import Tensors
from fedlm.recipe.guards import GuardSpec

Shapes = dict[str, torch.Size]
"""Names and shapes of what lies end to end in a vector, in this order."""

Parts = dict[str, tuple[torch.dtype, int]]
"""Names, types and lengths of the tensors that a guard sends itself."""

LARGEST = 2.0**108
"""Largest magnitude that guards take: no step of theirs overflows fp32 below it, and no larger one can be averaged."""


class Guard:
    """One step of a chain.

    Args:
        spec: the recipe's.
        unbiased: whether what is decoded shall be the input in expectation, where a guard has the choice; without, the
            nearest it can get, which is what error feedback needs.
    """

    def __init__(self, spec: GuardSpec, *, unbiased: bool) -> None:
        self.spec, self.unbiased = spec, unbiased

    def left(self, shapes: Shapes) -> Shapes:  # noqa: ARG002
        """What it leaves to the next guard; nothing by default.

        Raises:
            UpdateRefused: it cannot work on numbers of these shapes.
        """
        return {}

    def parts(self, shapes: Shapes) -> Parts:
        """What it sends itself."""
        raise NotImplementedError

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:
        """What it leaves (fp32, as long as `left` says) and its own parts.

        Args:
            values: fp32, none beyond `LARGEST`; not changed.
            random: a generator of this guard alone; `decode` gets one in the same state.
        """
        raise NotImplementedError

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:
        """The values, fp32. The chain refuses what is not finite.

        Args:
            left: what the guards after it decoded, of any content.
            parts: of the types and lengths that `parts` says; what is in them may be anything.

        Raises:
            UpdateRefused: no honest encoder made these parts.
        """
        raise NotImplementedError


def size_of(shapes: Shapes) -> int:
    """Numbers in a vector."""
    return sum(shape.numel() for shape in shapes.values())


def flat(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Shapes]:
    """Tensors end to end in sorted order of their names, fp32.

    Raises:
        UpdateRefused: a tensor holds whole numbers, which have no smaller neighbours to round to; or a value is not
            finite, which no decoder could tell from a large one, or beyond `LARGEST`.
    """
    names = sorted(tensors)
    for name in names:
        if not tensors[name].is_floating_point():
            raise UpdateRefused(f"'{name}' is {tensors[name].dtype}: only floating-point numbers can be compressed")
    parts = [tensors[name].reshape(-1) for name in names]
    values = torch.cat(parts).to(torch.float32) if parts else torch.zeros(0)
    check_range(values, "the update")
    return values, {name: tensors[name].shape for name in names}


def magnitude(values: Tensor) -> float:
    """The largest absolute value, in one read; NaN if any value is NaN."""
    if not values.numel():
        return 0.0
    low, high = map(float, torch.aminmax(values))
    return max(-low, high)


def check_range(values: Tensor, what: str) -> None:
    """Raises UpdateRefused: a value is not finite or beyond `LARGEST`."""
    largest = magnitude(values)
    if not math.isfinite(largest):
        raise UpdateRefused(f"{what} holds values that are not finite (NaN or infinity)", fix="lower the learning rate")
    if largest > LARGEST:
        raise UpdateRefused(
            f"{what} holds values up to {largest:.3g}, and guards take none above {LARGEST:.3g}",
            fix="lower the learning rate",
        )


def parted(values: Tensor, shapes: Shapes) -> Tensors:
    """Views of a vector by name."""
    ends = pairwise(accumulate((shape.numel() for shape in shapes.values()), initial=0))
    return {
        name: values[start:end].view(shape) for (name, shape), (start, end) in zip(shapes.items(), ends, strict=True)
    }
