"""Conditional randomised rounding to whole numbers, and what it does to a norm.

After Kairouz, Liu, Steinke, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure
Aggregation", ICML 2021: a number is rounded up with the probability of its fraction, so that the
expectation stays; the whole vector is rounded again while its norm is above a bound. The bound holds always, hence the
privacy guarantee needs no further delta; the retries add a bias that is small with beta.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy.stream import SecretStream

TRIALS = 1000
"""Roundings after which something must be wrong: with beta 0.99 as many misses have a probability below 1e-4."""


def rounded_bound(bound: float, dimension: int, retry: float | None) -> float:
    """Largest L2 norm after rounding, in steps of the grid (theorem 1 of the paper with granularity 1).

    min{bound + sqrt(d), sqrt(bound^2 + d/4 + sqrt(2 ln(1/beta)) (bound + sqrt(d)/2))}.

    Args:
        bound: L2 norm before, in steps.
        dimension: d, numbers in the vector.
        retry: beta; 0 for the first term alone, None if nothing is rounded.
    """
    if retry is None:
        return bound
    worst = bound + math.sqrt(dimension)
    if retry == 0:
        return worst
    probable = bound**2 + dimension / 4 + math.sqrt(2 * math.log(1 / retry)) * (bound + math.sqrt(dimension) / 2)
    return min(worst, math.sqrt(probable))


def conditional_round(
    values: NDArray[np.float64], bound: float, retry: float | None, stream: SecretStream
) -> NDArray[np.int64]:
    """Whole numbers with the expectation of `values` (but for the condition), of a norm within `rounded_bound`.

    Args:
        values: [d], in steps of the grid, of an L2 norm within the bound.
        retry: beta; 0 rounds once; None refuses whatever is not a whole number.

    Raises:
        PrivacyError: values are not finite, beyond the bound, or (retry None) not whole.
    """
    if not np.isfinite(values).all():
        raise PrivacyError("values to be rounded are not finite")
    # The caller clips in other units and divides by the grid's step: a norm may come out above by rounding alone.
    if float(np.linalg.norm(values)) > bound * (1 + 1e-6):
        raise PrivacyError(
            f"the norm is {np.linalg.norm(values):.6g} steps, above the bound of {bound:.6g}", fix="clip it first"
        )
    floor = np.floor(values)
    fraction = values - floor
    if retry is None and fraction.any():
        raise PrivacyError("values are not whole numbers", fix="give a retry probability")
    limit = rounded_bound(bound, values.size, retry)
    for _ in range(TRIALS):
        rounded = (floor + (stream.uniform(values.size).reshape(values.shape) < fraction)).astype(np.int64)
        if float(np.dot(rounded.ravel().astype(np.float64), rounded.ravel().astype(np.float64))) <= limit**2:
            return rounded
    raise PrivacyError(
        f"{TRIALS} roundings were all above {limit:.6g} steps", fix="raise the retry probability, or the bound"
    )
