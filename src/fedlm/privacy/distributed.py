"""Rényi differential privacy of sums to which every silo added whole-number noise; libraries have no such bounds.

Both hold for any vectors that the attacker chooses within the bound, and count the rounding (`fedlm.privacy.rounding`).
Dropping modular wrap-around changes nothing: it is post-processing of the sum. The tests compare them with exact
convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy.mechanisms import DistributedNoise, noise_multiplier
from fedlm.privacy.rounding import rounded_bound

SMALLEST_SIGMA = 0.5
"""Of a silo's discrete Gaussian, in steps of the grid: the bound on sums is for no smaller one."""


def renyi(mechanism: DistributedNoise, orders: Sequence[float]) -> NDArray[np.float64]:
    """Rényi divergence bound of one release at each order above 1, [len(orders)].

    Raises:
        PrivacyError: the noise is below what the bound covers.
    """
    if mechanism.noise == "skellam":
        return skellam_renyi(mechanism, orders)
    return discrete_gaussian_renyi(mechanism, orders)


def sensitivities(mechanism: DistributedNoise) -> tuple[float, float]:
    """How far a neighbour moves the sum, (L1, L2), in steps of the grid.

    Whole numbers have L1 <= L2^2, as any have L1 <= sqrt(d) L2. Replacing takes one vector away and adds another.
    """
    bound = rounded_bound(mechanism.bound, mechanism.dimension, mechanism.retry)
    moves = 2 if mechanism.adjacency == "replace" else 1
    return moves * bound * min(math.sqrt(mechanism.dimension), bound), moves * bound


def discrete_gaussian_renyi(mechanism: DistributedNoise, orders: Sequence[float]) -> NDArray[np.float64]:
    """Kairouz, Liu, Steinke, ICML 2021, proposition 14, at any order.

    A sum of n discrete Gaussians is none, but nearly: with s the sigma of each,
    tau = 10 sum_{k=1}^{n-1} exp(-2 pi^2 s^2 k/(k+1)), S = sqrt(n) s, and sensitivities D1, D2,
    rdp(a) = min{a D2^2/(2 S^2) + tau d, a/2 (D2^2/S^2 + 2 tau D1/S + tau^2 d), a/2 (D2/S + tau sqrt(d))^2}.
    """
    sigma, silos, dimension = mechanism.silo_scale(), mechanism.survivors, mechanism.dimension
    if sigma < SMALLEST_SIGMA:
        raise PrivacyError(
            f"a silo's noise is {sigma:.3g} steps of the grid; the bound on sums of discrete Gaussians begins at "
            f"{SMALLEST_SIGMA}",
            fix="take a finer grid or more noise",
        )
    # Terms soon are all the same, exp(-2 pi^2 s^2): a sum over thousands of silos stays cheap.
    tau = 10 * math.fsum(math.exp(-2 * (math.pi * sigma) ** 2 * k / (k + 1)) for k in range(1, silos))
    l1, l2 = (length / (math.sqrt(silos) * sigma) for length in sensitivities(mechanism))
    order = np.asarray(orders, dtype=np.float64)
    near = order / 2 * l2**2 + tau * dimension
    far = order / 2 * min(l2**2 + 2 * l1 * tau + tau**2 * dimension, (l2 + math.sqrt(dimension) * tau) ** 2)
    return np.minimum(near, far)


def skellam_renyi(mechanism: DistributedNoise, orders: Sequence[float]) -> NDArray[np.float64]:
    """Agarwal, Kairouz, Liu, NeurIPS 2021, corollary 3.6, for whole orders; others take the next whole one, since Rényi
    divergence grows with its order.

    Sums of Skellam noise are Skellam noise: with m the variance of all survivors' together,
    rdp(a) = a D2^2/(2m) + min{((2a-1) D2^2 + 6 D1)/(4 m^2), 3 D1/(2m)}.
    """
    l1, l2 = sensitivities(mechanism)
    variance = (noise_multiplier(mechanism) * mechanism.bound) ** 2
    order = np.ceil(np.asarray(orders, dtype=np.float64))
    extra = np.minimum(((2 * order - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
    found: NDArray[np.float64] = order * l2**2 / (2 * variance) + extra
    return found
