"""What goes under the mask: values as small non-negative integers, times a weight, with the weight beside them.

With Q = 2^(bits-1) - 1 levels on either side, a value in [-c, c] becomes q = Q + round(x Q / c), 0 to 2 Q, and 0 is met
exactly. A silo sends w q for each value and w itself; the sums S and W give the weighted mean (S - Q W) / W x c / Q.
Rounding is stochastic (up with the fraction's probability), so the mean is right in expectation within [-c, c], and a
value is off by less than one step c / Q. The scale c is public and fixed before the round: it must not depend on
anybody's update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Fields
from fedlm.privacy.secagg.message import Words

BLOCK = 1 << 15
"""Values at a time."""


@dataclass(frozen=True)
class Encoding:
    """How values become ring elements; public.

    Attributes:
        scale: c, the largest magnitude that is kept.
        bits: of one value, 2 to 24.
        largest_weight: no silo's weight is above it.
        silos: of the cohort, all of whom may have that weight.

    Raises:
        RunError: these do not go together, or the sum does not fit into 32 bits.
    """

    scale: float
    bits: int
    largest_weight: int
    silos: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 2.0**-100 <= self.scale <= 2.0**100):
            raise RunError(f"a scale of {self.scale:g} cannot be counted in", fix="give about the largest value's size")
        if not 2 <= self.bits <= 24:
            raise RunError(f"values are quantised to 2 to 24 bits, not {self.bits}")
        if self.largest_weight < 1 or self.silos < 1:
            raise RunError("the largest weight and the number of silos are 1 or more")
        if self.ring_bits > 32:
            spare = 32 - (self.silos * self.largest_weight - 1).bit_length()
            most = 2 ** (32 - self.bits) // self.silos
            ways = [f"quantise to {spare} bits"] if spare >= 2 else []
            ways += [f"let no weight be above {most} (count in larger units)"] if most else []
            raise RunError(
                f"the sum of {self.silos} silos with weights up to {self.largest_weight} and {self.bits} bits a value "
                f"takes {self.ring_bits} bits, and there are 32",
                fix=" or ".join(ways) or "ask fewer silos at a time",
            )

    @property
    def ring_bits(self) -> int:
        """Bits of a ring in which no sum wraps around."""
        return max(2, self.bits + (self.silos * self.largest_weight - 1).bit_length())

    @property
    def levels(self) -> int:
        """Q."""
        return (1 << self.bits - 1) - 1

    @property
    def fields(self) -> Fields:
        """As plain JSON, for `Parameters.agreed`."""
        return {
            "scale": float(self.scale),
            "bits": self.bits,
            "largest_weight": self.largest_weight,
            "silos": self.silos,
        }


def encode(values: NDArray[Any], weight: int, encoding: Encoding, random: np.random.Generator) -> tuple[Words, int]:
    """A silo's ring elements, uint32 [n + 1], the weight last; and how many values were clipped.

    Args:
        values: floating-point, [n].
        weight: 1 to the largest weight.
        random: for the rounding; nobody else may know its state, since it would tell what was rounded away.

    Raises:
        UpdateRefused: the weight is out of range, or a value is not finite.
    """
    if values.ndim != 1 or values.dtype.kind != "f":
        raise UpdateRefused(f"values are {values.dtype} {list(values.shape)}, not floating-point [n]")
    if not 1 <= weight <= encoding.largest_weight:
        raise UpdateRefused(
            f"a weight of {weight} is not from 1 to {encoding.largest_weight}",
            fix="agree on a larger cap before the round",
        )
    ring, clipped = np.empty(len(values) + 1, np.uint32), 0
    top, factor = 2 * encoding.levels, encoding.levels / encoding.scale
    for start in range(0, len(values), BLOCK):
        part = values[start : start + BLOCK].astype(np.float64)
        if not np.isfinite(part).all():
            raise UpdateRefused(
                "the update holds values that are not finite (NaN or infinity)", fix="lower the learning rate"
            )
        part *= factor
        part += encoding.levels
        clipped += int(np.count_nonzero((part < 0) | (part > top)))
        np.clip(part, 0, top, out=part)
        part += random.random(len(part))
        np.floor(part, out=part)
        np.minimum(part, top, out=part)
        part *= weight
        ring[start : start + len(part)] = part
    ring[-1] = weight
    return ring, clipped


def decode(total: Words, silos: int, encoding: Encoding) -> tuple[NDArray[np.float64], int]:
    """The weighted mean of the values, float64 [n], and the sum of the weights.

    Args:
        total: sum of the silos' ring elements, uint32 [n + 1].
        silos: how many there are in it.

    Raises:
        RunError: no silos' elements have this sum: a silo sent what it should not, or a mask is still on.
    """
    weights = int(total[-1])
    if not silos <= weights <= silos * encoding.largest_weight:
        raise _impossible(f"the weights' sum is {weights}, with {silos} silos of 1 to {encoding.largest_weight}")
    largest = int(total[:-1].max(initial=0))
    if largest > 2 * encoding.levels * weights:
        raise _impossible(
            f"a sum is {largest}, with weights of {weights} in all at most {2 * encoding.levels * weights}"
        )
    values = total[:-1].astype(np.float64)
    values -= float(encoding.levels * weights)  # exact: both are integers below 2^53
    values /= weights
    values *= encoding.scale / encoding.levels
    return values, weights


def _impossible(what: str) -> RunError:
    return RunError(
        f"the aggregate is out of range: {what}", fix="repeat the round, and find the silo that lies if it recurs"
    )
