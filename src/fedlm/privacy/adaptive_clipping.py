"""A clipping bound that follows a quantile of the updates' norms.

Andrew, Thakkar, McMahan, Ramaswamy, "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, algorithm 1
with the geometric update. Each unit sends, beside its clipped update, whether it was within the bound; noise on that
count is paid for out of the same budget, so that both together cost what one sum with the noise multiplier asked for
would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedlm.errors import PrivacyError


def default_count_noise(noise_multiplier: float, units: float) -> float:
    """sigma_b where nobody chose one: a twentieth of a round's units, as the paper takes it, and at least the noise
    multiplier that both together may cost: `update_noise` is at most 2 / sqrt(3) = 1.16 times it then."""
    return max(noise_multiplier, units / 20)


@dataclass(frozen=True)
class AdaptiveClipping:
    """The rule; the bound itself is the caller's state.

    Args:
        count_noise: sigma_b, standard deviation of the noise on the count of units within the bound. The paper takes a
            twentieth of the expected number of units.
        quantile: gamma, the share of updates that shall be within the bound.
        rate: eta_C, learning rate of the bound's logarithm.
    """

    count_noise: float
    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.count_noise) and self.count_noise > 0):
            raise PrivacyError(f"noise on the count is {self.count_noise}; it must be above 0 and finite")
        if not 0 < self.quantile < 1:
            raise PrivacyError(f"the quantile is {self.quantile}; it must be above 0 and below 1")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise PrivacyError(f"the bound's learning rate is {self.rate}; it must be above 0 and finite")

    def update_noise(self, noise_multiplier: float) -> float:
        """z_delta, the noise multiplier for the sum of updates, such that sum and count together cost as much as
        `noise_multiplier`: z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2) (theorem 1).

        The count is summed as +1/2 or -1/2 per unit (`indicator`), a sensitivity of 1/2.

        Raises:
            PrivacyError: the count alone costs that much already.
        """
        if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
            raise PrivacyError(f"noise multiplier is {noise_multiplier}; it must be above 0 and finite")
        left = noise_multiplier**-2 - (2 * self.count_noise) ** -2
        if left <= 0:
            raise PrivacyError(
                f"noise of {self.count_noise:g} on the count spends the whole budget of noise multiplier "
                f"{noise_multiplier:g}",
                fix=f"take more than {noise_multiplier / 2:g}; the paper takes a twentieth of the number of units",
            )
        return float(left**-0.5)

    def indicator(self, within: bool) -> float:
        """What a unit adds to the count."""
        return 0.5 if within else -0.5

    def step(self, bound: float, noisy_count: float, units: float) -> float:
        """The next bound: C exp(-eta_C (b - gamma)), b being the share within the bound.

        Args:
            bound: this round's, C.
            noisy_count: sum of `indicator` over the round's units, with noise of standard deviation `count_noise`.
            units: of this round; known to everyone, or its expectation where sampling is Poisson.
        """
        if not units >= 1 or not math.isfinite(noisy_count) or not (math.isfinite(bound) and bound > 0):
            raise PrivacyError(f"no step from bound {bound} with a count of {noisy_count} over {units} units")
        share = noisy_count / units + 0.5
        return bound * math.exp(-self.rate * (share - self.quantile))
