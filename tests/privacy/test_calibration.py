"""Noise for a budget: against `dp-accounting`'s own calibration and the exact Gaussian; budgets that are none."""

from __future__ import annotations

import math

import dp_accounting
import pytest

from fedlm.errors import PrivacyError
from fedlm.privacy.accounting import spent
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.mechanisms import DistributedNoise, FixedSize, Gaussian, Noise, Poisson


@pytest.mark.parametrize(("epsilon", "count"), [(0.5, 1), (3.0, 40), (8.0, 500)])
def test_gaussian_against_the_exact_one(epsilon: float, count: int) -> None:
    found = calibrate(Gaussian("silo", "zero-out", None, count=count), epsilon, 1e-5, units=100)
    exact = dp_accounting.get_sigma_gaussian(epsilon, 1e-5) * math.sqrt(count)
    assert found.noise_multiplier == pytest.approx(exact, rel=1e-3)
    assert spent([found], 1e-5).epsilon <= epsilon


def test_replacing_needs_twice_the_noise() -> None:
    (one, two) = (calibrate(Gaussian("silo", kind, None), 2.0, 1e-5, 100) for kind in ("zero-out", "replace"))
    assert one.noise_multiplier is not None
    assert two.noise_multiplier == pytest.approx(2 * one.noise_multiplier, rel=1e-3)


def test_poisson_against_dp_accounting() -> None:
    """A thousandth less noise is too little, by an accountant called by hand."""
    found = calibrate(Gaussian("example", "add-or-remove", None, Poisson(0.05, secret=True), 400), 0.6, 1e-6, 50_000)
    assert found.noise_multiplier is not None

    def by_hand(noise: float) -> float:
        event = dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(noise))
        return float(dp_accounting.pld.PLDAccountant().compose(event, 400).get_epsilon(1e-6))

    assert by_hand(found.noise_multiplier) <= 0.6 < by_hand(found.noise_multiplier * (1 - 1e-3))


@pytest.mark.slow
def test_without_replacement_by_rdp() -> None:
    found = calibrate(Gaussian("silo", "replace", None, FixedSize(4, 40, secret=True), 5), 4.0, 1e-3, 40)
    assert 4.0 * 0.999 < spent([found], 1e-3).epsilon <= 4.0


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
def test_distributed_noise(noise: Noise) -> None:
    """On a fine grid, what the continuous Gaussian needs under the same accountant, and a little more."""
    budget = 3.0, 1e-3, 20
    fine = DistributedNoise("silo", "zero-out", noise, None, bound=1e5, dimension=1000, survivors=5, count=10)
    found = calibrate(fine, *budget)
    assert found.noise_multiplier is not None
    assert 3.0 * 0.999 < spent([found], 1e-3).epsilon <= 3.0
    rdp = spent([Gaussian("silo", "zero-out", found.noise_multiplier, count=10)], 1e-3).rdp
    assert rdp == pytest.approx(3.0, rel=5e-3)


def test_a_coarse_grid_ends_where_its_bound_begins() -> None:
    """So much may be spent that less noise would do, but no bound covers it."""
    found = calibrate(
        DistributedNoise("silo", "zero-out", "discrete-gaussian", None, bound=2, dimension=1, survivors=4, retry=None),
        90,
        1e-3,
        5,
    )
    assert found.silo_scale() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("epsilon", "delta", "units", "word"),
    [
        (0.0, 1e-5, 10, "epsilon"),
        (-1.0, 1e-5, 10, "epsilon"),
        (float("nan"), 1e-5, 10, "epsilon"),
        (float("inf"), 1e-5, 10, "epsilon"),
        (101.0, 1e-5, 10, "say nothing"),
        (1.0, 0.1, 10, "publishes a unit at random"),
        (1.0, 0.5, 10, "publishes a unit at random"),
        (1.0, 0.0, 10, "delta"),
        (1.0, 1e-5, 0, "at least 1"),
    ],
)
def test_budgets_that_are_none(epsilon: float, delta: float, units: int, word: str) -> None:
    with pytest.raises(PrivacyError, match=word):
        calibrate(Gaussian("silo", "zero-out", None), epsilon, delta, units)


def test_a_mechanism_that_no_accountant_covers() -> None:
    with pytest.raises(PrivacyError, match="no accountant covers"):
        calibrate(Gaussian("silo", "zero-out", None, FixedSize(4, 40, secret=True)), 1.0, 1e-3, 40)
