"""The least noise that keeps a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import scipy.optimize

from fedlm.errors import PrivacyError
from fedlm.privacy.accounting import merged, not_in_pld, not_in_rdp, pld_epsilon, rdp_epsilon, spent
from fedlm.privacy.distributed import SMALLEST_SIGMA
from fedlm.privacy.mechanisms import DistributedNoise, Gaussian

M = TypeVar("M", Gaussian, DistributedNoise)

TOLERANCE = 1e-4
"""Relative, of a noise multiplier, upwards."""

LARGEST_EPSILON = 100.0
"""Above it a guarantee is empty: odds may change by e^100."""

SMALLEST_NOISE, LARGEST_NOISE = 2.0**-6, 2.0**20


def calibrate(mechanism: M, epsilon: float, delta: float, units: int) -> M:
    """The mechanism with the smallest noise multiplier that costs at most (epsilon, delta).

    Args:
        mechanism: its noise multiplier is ignored, and may be None.
        epsilon: above 0, at most `LARGEST_EPSILON`.
        delta: below 1/units.
        units: how many units the guarantee protects: examples, users or silos.

    Raises:
        PrivacyError: the budget is impossible or empty, or no accountant covers the mechanism.
    """
    check_budget(epsilon, delta, units)

    def noisy(noise: float) -> M:
        return dataclasses.replace(mechanism, noise_multiplier=noise)

    spent([noisy(LARGEST_NOISE)], delta)  # raises where nothing covers it

    least, first = SMALLEST_NOISE, 1.0
    if isinstance(mechanism, DistributedNoise) and mechanism.noise == "discrete-gaussian":
        least = SMALLEST_SIGMA * math.sqrt(mechanism.survivors) / mechanism.bound * (1 + 1e-12)
    (loud,) = merged([noisy(LARGEST_NOISE)])
    by_pld = not_in_pld(loud) is None
    if not_in_rdp(loud) is None:
        tolerance = 0.02 if by_pld else TOLERANCE
        first = _smallest(lambda noise: rdp_epsilon([noisy(noise)], delta), epsilon, least, first, tolerance)
    if by_pld:  # tighter and slower: begins next to the other's answer
        first = _smallest(lambda noise: pld_epsilon([noisy(noise)], delta), epsilon, least, first, TOLERANCE)
    return noisy(first)


def check_budget(epsilon: float, delta: float, units: int) -> None:
    """Refuse budgets that no mechanism keeps, or that say nothing.

    With delta >= 1/n a mechanism may publish one of n units picked at random, whole: its probability of hitting yours
    is 1/n. (Dwork and Roth, "The Algorithmic Foundations of Differential Privacy", 2014.)

    Raises:
        PrivacyError: epsilon is not above 0, or above `LARGEST_EPSILON`; delta is not within (0, 1/units).
    """
    if not 0 < epsilon <= LARGEST_EPSILON:
        raise PrivacyError(
            f"epsilon is {epsilon}; it must be above 0, and above {LARGEST_EPSILON:g} it would say nothing",
            fix="choose one between 0.1 and 10",
        )
    if units < 1:
        raise PrivacyError(f"{units} units are protected; there must be at least 1")
    if not 0 < delta < 1 / units:
        raise PrivacyError(
            f"delta is {delta}; it must be above 0 and below 1/{units}, 1 over the units protected: "
            "otherwise a mechanism that publishes a unit at random would do",
            fix=f"take at most {0.1 / units:.1g}",
        )


def _smallest(costs: Callable[[float], float], epsilon: float, least: float, first: float, tolerance: float) -> float:
    """The smallest noise multiplier from `least` on that costs at most epsilon, looked for from `first` on."""
    known: dict[float, float] = {}

    def over(logarithm: float) -> float:
        if logarithm not in known:
            known[logarithm] = costs(math.exp(logarithm)) - epsilon
        return known[logarithm]

    floor = math.log(least)
    high = max(math.log(first), floor)
    step = 0.1
    while over(high) > 0:
        high, step = high + step, 2 * step
        if high > math.log(LARGEST_NOISE):
            raise PrivacyError(f"no noise multiplier up to {LARGEST_NOISE:g} keeps epsilon {epsilon:g}")
    low, step = high, 0.1
    while low > floor and over(low) <= 0:
        high, low, step = low, max(low - step, floor), 2 * step
    if over(low) <= 0:
        return math.exp(low)
    found: float = scipy.optimize.brentq(over, low, high, xtol=tolerance / 4, rtol=1e-12)
    while over(found) > 0:
        found += tolerance / 4
    return math.exp(found)
