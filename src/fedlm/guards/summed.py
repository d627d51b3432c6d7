"""What lies under a mask when figures of held-out rows are added up: sums and counts, of which the coordinator learns
those over all silos alone.

Each number is a whole one in units of 2^-24, in two's complement of 96 bits, cut into limbs of 16 bits. The ring has
room for the sum of every limb, so that the total is exact but for the rounding to these units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Fields
from fedlm.privacy.secagg.message import Words
from fedlm.recipe.heads import labels_of
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import COUNTS, FIGURES

FRACTION, LIMB, LIMBS = 24, 16, 6

LARGEST = 2**53
"""Magnitude of a number; the sum of 2^16 such is within 95 bits."""


def figures_length(recipe: Recipe) -> int:
    """Elements of a silo's vector."""
    return LIMBS * (len(COUNTS) + 1 + 2 * len(_figures(recipe)))


def figures_ring(silos: int) -> int:
    """Bits of the ring, for a sum over so many silos.

    Raises:
        RunError: there are too many.
    """
    bits = LIMB + (silos - 1).bit_length()
    if bits > 32:
        raise RunError(f"figures of {silos} silos take {bits} bits, and there are 32", where="guards")
    return bits


def figures_agreed(recipe: Recipe) -> Fields:
    """Which numbers are added up, in which units, as plain JSON: for `Parameters.agreed`."""
    return {"figures": [*COUNTS, "loss_sum", *FIGURES], "labels": len(labels_of(recipe)), "fraction": FRACTION}


def hidden_figures(measured: Fields, recipe: Recipe) -> Words:
    """A silo's ring elements, uint32 [figures_length].

    Args:
        measured: of `fedlm.evaluation.measure`; what it lacks counts 0.

    Raises:
        UpdateRefused: a number is not finite or absurd, or a figure has no place in the sum.
    """
    words: list[int] = []
    for name, value in _numbers(measured, recipe):
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:  # nor NaN
            raise UpdateRefused(f"the figure '{name}' is {str(value)[:40]}, and cannot be added up")
        whole = round(math.ldexp(value, FRACTION)) % 2 ** (LIMB * LIMBS)
        words += [whole >> (LIMB * place) & (2**LIMB - 1) for place in range(LIMBS)]
    return np.array(words, dtype=np.uint32)


def shown_figures(total: Words, recipe: Recipe) -> Fields:
    """The numbers over all silos, as `fedlm.evaluation.measure` has them of one.

    Raises:
        RunError: no silos' counts have this sum.
    """
    limbs = total.astype(object).reshape(-1, LIMBS)
    values: list[float] = []
    for row in limbs:
        whole = sum(int(limb) << (LIMB * place) for place, limb in enumerate(row)) % 2 ** (LIMB * LIMBS)
        values.append(math.ldexp(whole - (2 ** (LIMB * LIMBS) if whole >> (LIMB * LIMBS - 1) else 0), -FRACTION))
    whole_numbers, rest = values[: len(COUNTS)], values[len(COUNTS) + 1 :]
    if not all(value.is_integer() for value in whole_numbers):
        raise RunError("the aggregate is out of range: a count is no whole number")
    return {
        **{name: int(value) for name, value in zip(COUNTS, whole_numbers, strict=True)},
        "loss_sum": values[len(COUNTS)],
        "figures": dict(zip(_figures(recipe), zip(rest[::2], rest[1::2], strict=True), strict=True)),
    }


def _figures(recipe: Recipe) -> Sequence[str]:
    """Every figure that a task may count, so that what a silo has rows for changes no place."""
    return [*FIGURES, *(f"label_f1/{k}" for k in range(len(labels_of(recipe))))]


def _numbers(measured: Fields, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    known, figures = _figures(recipe), measured.get("figures", {})
    if strange := sorted(figures.keys() - set(known)):
        raise UpdateRefused(f"the figure '{strange[0]}' has no place in the sum over silos")
    for name in (*COUNTS, "loss_sum"):
        yield name, measured.get(name, 0)
    for name in known:
        for value in figures.get(name, (0, 0)):
            yield name, value
