"""Intervals: Wilson for accuracies, bootstrap over items for anything else, Student's t over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from fedlm.randomness import numpy_generator

Interval = tuple[float, float]


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson, JASA 1927): sound for small counts and proportions near 0 or 1.

    Raises:
        ValueError: when there are no trials, or more successes than trials.
    """
    if total <= 0 or not 0 <= successes <= total:
        raise ValueError(f"need 0 <= successes <= total and total > 0, got {successes} of {total}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray | None = None,
    *,
    seed: int,
    purpose: str,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile interval of sum(values) / sum(weights) over resampled items (Efron, 1979).

    Args:
        values: one number per item, e.g. 0/1 for right, or the summed NLL of its target tokens.
        weights: one number per item, e.g. its target tokens; 1 each by default, which makes it a plain mean.
        seed: with `purpose` the key of the draws, so the same call always gives the same interval.

    A paired comparison passes the differences of the two arms, item by item.
    """
    numerator = np.asarray(values, dtype=np.float64)
    denominator = np.ones_like(numerator) if weights is None else np.asarray(weights, dtype=np.float64)
    if numerator.ndim != 1 or numerator.shape != denominator.shape or not len(numerator):
        raise ValueError("need one value, and one weight if any, for at least one item")
    generator = numpy_generator(seed, "bootstrap", purpose)
    estimates = np.empty(resamples)
    chunk = max(1, 4_000_000 // len(numerator))  # bounds the memory at about 32 MB of indices
    for start in range(0, resamples, chunk):
        rows = generator.integers(0, len(numerator), size=(min(chunk, resamples - start), len(numerator)))
        below = denominator[rows].sum(axis=1)
        estimates[start : start + len(rows)] = numerator[rows].sum(axis=1) / np.where(below > 0, below, np.nan)
    low, high = np.nanquantile(estimates, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def student_t(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the mean over repeated runs (seeds), for normal scatter; needs at least two values."""
    count = len(values)
    if count < 2:
        raise ValueError("an interval over seeds needs at least two seeds")
    mean = sum(values) / count
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1))
    half = t_quantile(0.5 + confidence / 2, count - 1) * deviation / math.sqrt(count)
    return mean - half, mean + half


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t for a whole number of degrees of freedom, by bisection of `t_cdf`."""
    if not 0.5 <= probability < 1.0:
        raise ValueError(f"probability must lie in [0.5, 1), got {probability}")
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: int) -> float:
    """Student's t distribution function as a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(theta), math.sin(theta)
    if freedom % 2:
        term, total = cosine, cosine if freedom > 1 else 0.0
        for k in range(2, freedom - 1, 2):
            term *= cosine * cosine * k / (k + 1)
            total += term
        inside = 2 / math.pi * (theta + sine * total)
    else:
        term, total = 1.0, 1.0
        for k in range(1, freedom - 2, 2):
            term *= cosine * cosine * k / (k + 1)
            total += term
        inside = sine * total
    return 0.5 + inside / 2
