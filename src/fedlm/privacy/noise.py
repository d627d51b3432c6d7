"""Noise for releases, drawn from a secret stream.

Whole-number noise is exact: a 128-bit uniform number is looked up in the cumulative distribution, tabulated to 128 bits
from integer arithmetic. A draw is off by a total variation of at most (table's length) x 2^-128; for 5 million draws
from a table of a million that is 2^-85, far below any delta. (Canonne, Kamath, Steinke, "The Discrete Gaussian for
Differential Privacy", NeurIPS 2020, sample exactly by rejection, a number at a time; a table is the same distribution,
by the million.)

Continuous noise cannot be exact: the floating-point values that a sampler can reach depend on it, and the low bits of a
noisy number tell what it was before (Mironov, "On Significance of the Least Significant Bits for Differential Privacy",
CCS 2012). Two ways out, one proved and one not:

- what leaves an organisation under a guarantee: round to a grid (`fedlm.privacy.rounding`) and add whole-number noise;
  every sum is exact, and the accountant counts the rounding;
- noise on gradients inside training, where a grid would cost more than the steps themselves: `gaussian` adds up four
  normals, after Holohan and Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021, and Opacus' secure
  mode. Many combinations of four give the same number, so its bits no longer tell which; a safeguard, not a proof.

Neither hides how long a draw takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy.stream import SecretStream

LARGEST_SCALE = 2.0**17
"""Largest scale of a table, in steps of the grid; it takes seconds and 30 MB to make."""

TABLES = 4
"""Tables kept."""

_FINE = 512
"""Bits behind the point while a table is made."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Table:
    """P(|X| <= k), k = 0, 1, ..., in units of 2^-128: high and low words. What is above all entries is the next k."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]


def gaussian(stream: SecretStream, scale: float, count: int) -> NDArray[np.float64]:
    """[count] normal numbers of mean 0 and standard deviation `scale`: four by Box and Muller added up and halved.

    Raises:
        PrivacyError: the scale is not positive and finite.
    """
    _check_scale(scale)
    found = np.empty(count)
    for start in range(0, count, _CHUNK):
        part = found[start : start + _CHUNK]
        part[:] = 0.0
        for _ in range(2):  # a pair each
            # In (0, 1]: the logarithm is finite, and the largest radius is 9.4.
            radius = (stream.words(part.size).astype(np.float64) + 1.0) * 2.0**-64
            np.sqrt(np.multiply(np.log(radius, out=radius), -2.0, out=radius), out=radius)
            angle = stream.uniform(part.size) * (2 * math.pi)
            # cos + sin of one radius are two independent normals.
            part += radius * (np.cos(angle) + np.sin(angle))
        part *= scale / 2
    return found


def discrete_gaussian(stream: SecretStream, sigma: float, count: int) -> NDArray[np.int64]:
    """[count] whole numbers x with probability proportional to exp(-x^2 / (2 sigma^2)).

    Raises:
        PrivacyError: sigma is not positive, or above `LARGEST_SCALE`.
    """
    _check_scale(sigma, LARGEST_SCALE)
    return _draw(gaussian_table(sigma), stream, count)


def skellam(stream: SecretStream, variance: float, count: int) -> NDArray[np.int64]:
    """[count] differences of two Poisson numbers of mean variance/2 each.

    Raises:
        PrivacyError: the variance is not positive, or above the square of `LARGEST_SCALE`.
    """
    _check_scale(variance, LARGEST_SCALE**2)
    return _draw(skellam_table(variance), stream, count)


@lru_cache(maxsize=TABLES)
def gaussian_table(sigma: float) -> Table:
    """Weights by their ratios: w(x+1) / w(x) = exp(-(2x+1) / (2 sigma^2)), itself falling by exp(-1/sigma^2)."""
    # exp(-t^2/2) < 2^-135 for t > 13.7; beyond that weights no longer reach the table's last bit.
    last = math.ceil(13.7 * sigma) + 2
    with localcontext() as context:
        context.prec = 170
        inverse = 1 / (Decimal(sigma) * Decimal(sigma))
        one = Decimal(2) ** _FINE
        fall = int((-inverse).exp() * one)
        ratio = int((-inverse / 2).exp() * one)
    weights, weight = [], 1 << _FINE
    for _ in range(last + 1):
        weights.append(weight)
        weight = weight * ratio >> _FINE
        ratio = ratio * fall >> _FINE
    return _table(weights)


@lru_cache(maxsize=TABLES)
def skellam_table(variance: float) -> Table:
    """Weights are Bessel functions I_k(variance), by their recurrence from far out inwards (Miller's algorithm):
    I_(k-1) = I_(k+1) + (2k / variance) I_k, whose rounding errors die out in this direction."""
    last = _skellam_tail(variance, 135)
    start = _skellam_tail(variance, 2 * 135) + 2
    numerator, denominator = variance.as_integer_ratio()
    above, here, weights = 0, 1 << _FINE, [0] * (last + 1)
    for k in range(start, 0, -1):
        above, here = here, above + 2 * k * denominator * here // numerator
        if k - 1 <= last:
            weights[k - 1] = here
    return _table(weights)


def _skellam_tail(variance: float, bits: int) -> int:
    """A k with P(X >= k) < 2^-bits, by Chernoff: exp(-v + sqrt(v^2 + k^2) - k asinh(k/v))."""
    k = 1
    while k * math.asinh(k / variance) - (math.hypot(variance, k) - variance) < bits * math.log(2):
        k = k + max(1, k // 16)
    return k


def _table(weights: list[int]) -> Table:
    """Of P(|X| = 0) proportional to the first weight, P(|X| = k) to twice the others."""
    sums = list(accumulate(weight if k == 0 else 2 * weight for k, weight in enumerate(weights)))
    words = 1 << 64
    shifted = [(part << 128) // sums[-1] for part in sums[:-1]]
    return Table(
        high=np.fromiter((value // words for value in shifted), np.uint64, len(shifted)),
        low=np.fromiter((value % words for value in shifted), np.uint64, len(shifted)),
    )


def _draw(table: Table, stream: SecretStream, count: int) -> NDArray[np.int64]:
    found = np.empty(count, np.int64)
    for start in range(0, count, _CHUNK):
        part = found[start : start + _CHUNK]
        part[:] = _lookup(table, stream.words(part.size), stream)
        np.negative(part, out=part, where=stream.bits(part.size).astype(bool))
    return found


def _lookup(table: Table, high: NDArray[np.uint64], stream: SecretStream) -> NDArray[np.int64]:
    """How many entries are at most a 128-bit number; its low word is drawn only where the high one does not decide."""
    found = np.searchsorted(table.high, high, side="left")
    inside = np.minimum(found, table.high.size - 1)
    for i in np.flatnonzero(table.high[inside] == high):
        low = stream.words(1)[0]
        while found[i] < table.high.size and table.high[found[i]] == high[i] and table.low[found[i]] <= low:
            found[i] += 1
    return found.astype(np.int64, copy=False)


def _check_scale(scale: float, largest: float = math.inf) -> None:
    if not (math.isfinite(scale) and 0 < scale <= largest):
        raise PrivacyError(
            f"noise of {scale:g} cannot be drawn: it must be above 0 and at most {largest:g}",
            fix="take a coarser grid" if scale > largest else None,
        )
