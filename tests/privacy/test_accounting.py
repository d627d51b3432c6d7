"""Epsilons against closed forms, an independent integration, and `dp-accounting` called by hand; refusals."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
import scipy.integrate
from scipy.stats import norm

from fedlm.errors import PrivacyError
from fedlm.privacy.accounting import ORDERS, Spent, _renyi, merged, rdp_epsilon, spent
from fedlm.privacy.mechanisms import Adjacency, DistributedNoise, FixedSize, Gaussian, Mechanism, Poisson, Sampling

DELTA = 1e-5


def gaussian_delta(epsilon: float, noise: float) -> float:
    """Of the Gaussian mechanism with sensitivity 1 (Balle and Wang, ICML 2018, theorem 8)."""
    a, b = 1 / (2 * noise), epsilon * noise
    return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b))


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (0.7, 3), (5.0, 100)])
@pytest.mark.parametrize(("adjacency", "moves"), [("add-or-remove", 1), ("zero-out", 1), ("replace", 2)])
def test_gaussians_without_sampling(noise: float, count: int, adjacency: Adjacency, moves: int) -> None:
    """T releases with noise z are one with z / sqrt(T); replacing moves the sum twice as far."""
    found = spent([Gaussian("silo", adjacency, noise, count=count)], DELTA)
    assert found.pld is not None and found.rdp is not None
    assert gaussian_delta(found.pld, noise / math.sqrt(count) / moves) == pytest.approx(DELTA, rel=1e-6)
    assert found.pld < found.rdp < found.pld * 1.2 + 0.5


def test_poisson_equals_dp_accounting_by_hand() -> None:
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.2)), 40
    )
    accountants = dp_accounting.pld.PLDAccountant(), dp_accounting.rdp.RdpAccountant()
    by_hand = [accountant.compose(event).get_epsilon(DELTA) for accountant in accountants]
    found = spent([Gaussian("example", "add-or-remove", 1.2, Poisson(0.05, secret=True), 40)], DELTA)
    assert found.pld == pytest.approx(by_hand[0], abs=1e-4)  # by_hand rounds losses up to finer steps
    assert found.rdp == pytest.approx(by_hand[1], abs=1e-6)
    assert found.epsilon == found.pld


def test_one_poisson_step_against_integration() -> None:
    """delta(epsilon) of (1-q) N(0, z^2) + q N(1, z^2) against N(0, z^2), the worse direction, integrated."""
    noise, rate = 0.8, 0.3
    found = spent([Gaussian("example", "add-or-remove", noise, Poisson(rate, secret=True))], DELTA).pld
    assert found is not None

    def above(x: float) -> float:
        base, moved = norm.pdf(x, 0, noise), norm.pdf(x, 1, noise)
        return max(0.0, (1 - rate) * base + rate * moved - math.exp(found) * base)

    delta = scipy.integrate.quad(above, -10, 12, points=[0, 1, 2, 3], limit=400, epsabs=1e-13)[0]
    # Rounded up by at most the step of 1e-4 in the privacy loss.
    assert delta <= DELTA * (1 + 1e-6)
    assert delta == pytest.approx(DELTA, rel=2e-3)


LOW = tuple(range(2, 17))


def exact_without_replacement(noise: float, rate: float) -> np.ndarray:
    """Rényi divergences where all other units are zero, and one that was +1 becomes -1: a mixture each, integrated."""
    grid = np.linspace(-60, 60, 240_001)
    zero, plus, minus = (norm.logpdf(grid, centre, noise) for centre in (0, 1, -1))
    upper = np.logaddexp(np.log(1 - rate) + zero, np.log(rate) + plus)
    lower = np.logaddexp(np.log(1 - rate) + zero, np.log(rate) + minus)
    sums = [np.trapezoid(np.exp(order * upper + (1 - order) * lower), grid) for order in LOW]
    return np.log(sums) / (np.array(LOW) - 1)


@pytest.mark.parametrize(("noise", "size", "of"), [(3.0, 5, 50), (2.0, 4, 5)])
def test_without_replacement_bounds_the_exact_divergence(noise: float, size: int, of: int) -> None:
    ours = dict(zip(ORDERS, _renyi(Gaussian("silo", "replace", noise, FixedSize(size, of, secret=True))), strict=True))
    assert (np.array([ours[order] for order in LOW]) >= exact_without_replacement(noise, size / of)).all()


def test_a_noise_multiplier_over_the_sensitivity_would_be_too_small() -> None:
    """What `dp-accounting` says of the same number lies below the exact divergence: it expects the sensitivity, 2."""
    accountant = dp_accounting.rdp.RdpAccountant(LOW, dp_accounting.NeighboringRelation.REPLACE_ONE)
    event = dp_accounting.SampledWithoutReplacementDpEvent(5, 4, dp_accounting.GaussianDpEvent(2.0))
    assert (accountant.compose(event).rdp < exact_without_replacement(2.0, 0.8)).any()


def test_sampling_helps_and_all_of_them_is_no_sampling() -> None:
    def cost(sampling: Sampling) -> float:
        return spent([Gaussian("silo", "replace", 4.0, sampling, 10)], DELTA).epsilon

    assert cost(FixedSize(2, 20, secret=True)) < 0.5 * cost(FixedSize(20, 20, secret=False))
    assert cost(FixedSize(20, 20, secret=False)) == cost(Poisson(1.0, secret=False))


@pytest.mark.parametrize(
    ("mechanisms", "word"),
    [
        ([Gaussian("silo", "zero-out", 1.0, FixedSize(5, 50, secret=True))], "only where a unit is replaced"),
        ([Gaussian("silo", "add-or-remove", 1.0, FixedSize(5, 50, secret=True))], "only where a unit is replaced"),
        ([Gaussian("silo", "replace", 1.0, FixedSize(5, 50, secret=False))], "not secret"),
        ([Gaussian("silo", "zero-out", 1.0, Poisson(0.1, secret=False))], "not secret"),
        (
            [
                Gaussian("silo", "replace", 9.0, FixedSize(5, 50, secret=True)),
                Gaussian("silo", "replace", 9.0, Poisson(0.1, secret=True)),
            ],
            "no accountant covers",
        ),
        (
            [
                DistributedNoise("silo", "replace", "skellam", 9.0, 10, 1, 3),
                Gaussian("silo", "replace", 9.0, Poisson(0.1, secret=True)),
            ],
            "no accountant covers",
        ),
        ([Gaussian("silo", "zero-out", 1.0), Gaussian("user", "zero-out", 1.0)], "cannot be composed"),
        ([Gaussian("silo", "zero-out", 1.0), Gaussian("silo", "replace", 1.0)], "cannot be composed"),
        ([Gaussian("silo", "zero-out", None)], "no noise multiplier"),
    ],
)
def test_refusals(mechanisms: list[Mechanism], word: str) -> None:
    with pytest.raises(PrivacyError, match=word):
        spent(mechanisms, DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, float("nan")])
def test_no_delta(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        spent([Gaussian("silo", "zero-out", 1.0)], delta)


def test_counts_add_up_in_any_order() -> None:
    a, b = Gaussian("silo", "zero-out", 4.0, count=3), Gaussian("silo", "zero-out", 5.0)
    assert merged([a, b, a]) == merged([Gaussian("silo", "zero-out", 4.0, count=6), b])
    assert spent([a, b, a], DELTA) == spent([b, a, a], DELTA)
    assert spent([], DELTA) == Spent(DELTA, 0.0, 0.0)


def test_mixed_releases_cost_less_than_their_sum_and_more_than_each() -> None:
    sampled = Gaussian("example", "zero-out", 1.0, Poisson(0.02, secret=True), 200)
    whole = Gaussian("example", "zero-out", 6.0, count=4)
    both, one, other = (spent(part, DELTA).epsilon for part in ([sampled, whole], [sampled], [whole]))
    assert max(one, other) < both < one + other
    found = spent([sampled, whole], DELTA)
    assert found.pld is not None and found.rdp is not None and found.pld < found.rdp


def test_distributed_noise_has_no_pld() -> None:
    mechanism = DistributedNoise("silo", "zero-out", "skellam", 3.0, bound=100, dimension=10, survivors=4)
    found = spent([mechanism, Gaussian("silo", "zero-out", 3.0)], DELTA)
    assert found.pld is None and found.rdp == found.epsilon
    assert found.epsilon > rdp_epsilon([mechanism], DELTA)
