"""Bounds for sums of whole-number noise against exact convolution, and what rounding does to a norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ive, logsumexp

from fedlm.errors import PrivacyError
from fedlm.privacy.distributed import renyi, sensitivities
from fedlm.privacy.mechanisms import Adjacency, DistributedNoise, Noise
from fedlm.privacy.rounding import conditional_round, rounded_bound
from fedlm.privacy.stream import SecretStream

ORDERS = (1.5, 2.0, 3.0, 4.5, 8.0, 16.0)


def summed_discrete_gaussians(sigma: float, silos: int, reach: int) -> np.ndarray:
    """ln P[X = -reach, ..., reach] of a sum, by convolution of logarithms: tails count at high orders."""
    x = np.arange(-reach, reach + 1)
    one = -(x**2) / (2 * sigma**2)
    one -= logsumexp(one)
    found = one
    padded = np.full(2 * x.size - 1, -np.inf)
    for _ in range(silos - 1):
        padded[reach : reach + x.size] = found
        # Row i holds the sum so far at i - (x), for every x.
        windows = np.lib.stride_tricks.sliding_window_view(padded, x.size)
        found = logsumexp(windows + one[::-1], axis=1)
    return found


def exact_renyi(logs: np.ndarray, shift: int, order: float) -> float:
    """Of the noise against the noise moved by `shift`, in one dimension."""
    p, q = logs[shift:], logs[: logs.size - shift]
    return float(logsumexp(order * p + (1 - order) * q)) / (order - 1)


def skellam_logs(variance: float, reach: int) -> np.ndarray:
    """ln P[X = k] = ln(e^-m I_|k|(m)), from I_0 on by ratios I_k / I_(k-1) = 1 / (2k/m + I_(k+1) / I_k)."""
    ratios, ratio = [], 0.0
    for k in range(2 * reach, 0, -1):
        ratio = 1 / (2 * k / variance + ratio)
        ratios.append(ratio)
    half = math.log(ive(0, variance)) + np.concatenate([[0.0], np.cumsum(np.log(ratios[::-1]))])[: reach + 1]
    return np.concatenate([half[:0:-1], half])


def mechanism(noise: Noise, sigma: float, silos: int, bound: float, **more: object) -> DistributedNoise:
    fields: dict[str, object] = {"dimension": 1, "retry": None, **more}
    return DistributedNoise(
        "silo",
        "zero-out",
        noise,
        sigma * math.sqrt(silos) / bound,
        bound=bound,
        survivors=silos,
        **fields,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("sigma", [0.5, 0.6, 0.8, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("silos", [1, 2, 3, 5])
def test_sums_of_discrete_gaussians(sigma: float, silos: int) -> None:
    for shift in (1, 2, 3):
        logs = summed_discrete_gaussians(sigma, silos, math.ceil(max(ORDERS) * shift + 12 * sigma * silos))
        exact = np.array([exact_renyi(logs, shift, order) for order in ORDERS])
        bound = renyi(mechanism("discrete-gaussian", sigma, silos, shift), ORDERS)
        assert (exact <= bound * (1 + 1e-9)).all()
        if sigma >= 2:  # tau has vanished: the bound is a Gaussian's, and tight
            np.testing.assert_allclose(exact, bound, rtol=1e-6)
            np.testing.assert_allclose(bound, np.array(ORDERS) * shift**2 / (2 * silos * sigma**2), rtol=1e-9)


def test_small_noise_needs_tau() -> None:
    """At the coarsest grid a sum is visibly no discrete Gaussian: a continuous Gaussian's formula would say too
    little."""
    logs = summed_discrete_gaussians(0.5, 3, 60)
    exact = np.array([exact_renyi(logs, 1, order) for order in ORDERS])
    assert (exact > 1.001 * np.array(ORDERS) / (2 * 3 * 0.25)).any()


@pytest.mark.parametrize("variance", [0.5, 1.0, 4.0, 30.0, 400.0])
@pytest.mark.parametrize("shift", [1, 3, 7])
def test_skellam(variance: float, shift: int) -> None:
    whole = [order for order in ORDERS if order == int(order)]
    reach = math.ceil(max(ORDERS) * shift + 20 * math.sqrt(variance)) + 200
    logs = skellam_logs(variance, reach)
    assert float(logsumexp(logs)) == pytest.approx(0, abs=1e-9)
    exact = np.array([exact_renyi(logs, shift, order) for order in whole])
    for silos in (1, 4):
        bound = renyi(mechanism("skellam", math.sqrt(variance / silos), silos, shift), whole)
        assert (exact <= bound * (1 + 1e-9)).all()
    if variance >= 400:
        np.testing.assert_allclose(exact, bound, rtol=0.02)


@pytest.mark.parametrize(("deviation", "smaller"), [(10.0, "first"), (0.9, "second")])
def test_skellam_by_hand(deviation: float, smaller: str) -> None:
    """Corollary 3.6 with D1 = 6, D2 = 3 at order 5, where either term of the minimum is the smaller."""
    noise = DistributedNoise("silo", "zero-out", "skellam", deviation / 3, 3.0, dimension=4, survivors=2, retry=None)
    variance = deviation**2
    extra = {"first": (9 * 9 + 6 * 6) / (4 * variance**2), "second": 3 * 6 / (2 * variance)}
    assert extra[smaller] == min(extra.values())
    assert float(renyi(noise, [5.0])[0]) == pytest.approx(5 * 9 / (2 * variance) + extra[smaller])


def test_fractional_orders_of_skellam_take_the_next_whole_one() -> None:
    noise = mechanism("skellam", 3.0, 2, 4)
    np.testing.assert_array_equal(renyi(noise, [1.1, 2.5, 10.5]), renyi(noise, [2, 3, 11]))


@pytest.mark.parametrize("noise", ["discrete-gaussian", "skellam"])
def test_fine_grids_cost_what_a_gaussian_costs(noise: Noise) -> None:
    """With the grid ever finer, the bound falls to that of continuous central noise."""
    costs = []
    for bound in (1e3, 1e4, 1e5, 1e6):
        fine = DistributedNoise("silo", "zero-out", noise, 1.0, bound=bound, dimension=10_000, survivors=5)
        costs.append(float(renyi(fine, [4.0])[0]))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(4.0 / 2, rel=1e-4)
    assert costs[0] > 1.002 * 4.0 / 2


def test_noise_is_sized_for_the_fewest_survivors() -> None:
    """The survivors' shares together have the noise multiplier asked for; one silo's alone is smaller by their root."""
    few = DistributedNoise("silo", "zero-out", "skellam", 2.0, bound=500.0, dimension=10, survivors=4)
    assert few.silo_scale() == pytest.approx(2.0 * 500 / 2)
    assert few.silo_scale() * math.sqrt(4) == pytest.approx(2.0 * 500)


def test_too_coarse_a_grid_is_refused() -> None:
    with pytest.raises(PrivacyError, match="finer grid"):
        renyi(mechanism("discrete-gaussian", 0.49, 3, 1), [2.0])


@pytest.mark.parametrize(("adjacency", "moves"), [("zero-out", 1), ("replace", 2)])
def test_sensitivities(adjacency: Adjacency, moves: int) -> None:
    noise = DistributedNoise("silo", adjacency, "skellam", 1.0, bound=3.0, dimension=4, survivors=2, retry=0)
    assert sensitivities(noise) == pytest.approx((moves * 2 * 5.0, moves * 5.0))  # 3 + sqrt(4), times sqrt(4)
    noise = DistributedNoise("silo", adjacency, "skellam", 1.0, bound=2.0, dimension=900, survivors=2, retry=None)
    assert sensitivities(noise) == pytest.approx((moves * 4.0, moves * 2.0))  # whole numbers: L1 <= L2^2


@pytest.mark.parametrize("beta", [0.01, math.exp(-0.5), 0.9])
def test_rounding_misses_its_bound_no_more_often_than_beta(beta: float) -> None:
    """Any vector, and the worst: halves, whose rounding adds d/4 to the squared norm on average."""
    random, dimension, trials = np.random.default_rng(3), 400, 4000
    for values in (random.standard_normal(dimension) / 10, np.full(dimension, 0.5)):
        bound, floor = float(np.linalg.norm(values)), np.floor(values)
        rounded = floor + (random.random((trials, dimension)) < values - floor)
        missed = float((np.linalg.norm(rounded, axis=1) > rounded_bound(bound, dimension, beta)).mean())
        assert missed <= beta


def test_rounded_bound_by_hand() -> None:
    assert rounded_bound(2.0, 36, 0.5) == pytest.approx(math.sqrt(4 + 9 + math.sqrt(2 * math.log(2)) * (2 + 3)))
    assert rounded_bound(2.0, 36, 0.0) == rounded_bound(2.0, 36, 1e-300) == 8.0
    assert rounded_bound(2.0, 36, None) == 2.0


def test_conditional_rounding_keeps_bound_and_expectation() -> None:
    stream = SecretStream(bytes(32), "rounding")
    values = np.array([0.25, -1.75, 3.0, 0.5] * 10)
    bound = float(np.linalg.norm(values))
    found = np.array([conditional_round(values, bound, 0.5, stream) for _ in range(4000)])
    assert (np.linalg.norm(found, axis=1) <= rounded_bound(bound, 40, 0.5)).all()
    assert set(np.unique(found[:, 1])) == {-2, -1} and set(np.unique(found[:, 2])) == {3}
    # Standard error 0.008; the condition makes a bias of that order.
    np.testing.assert_allclose(found.mean(axis=0), values, atol=0.04)


def test_rounding_refuses_what_is_beyond_the_bound() -> None:
    stream = SecretStream(bytes(32), "rounding")
    with pytest.raises(PrivacyError, match="clip it first"):
        conditional_round(np.array([3.0, 4.0]), 4.9, 0.5, stream)
    with pytest.raises(PrivacyError, match="not finite"):
        conditional_round(np.array([np.nan]), 4.9, 0.5, stream)
    with pytest.raises(PrivacyError, match="not whole"):
        conditional_round(np.array([0.5]), 4.9, None, stream)
    np.testing.assert_array_equal(conditional_round(np.array([3.0, -1.0]), 4.9, None, stream), [3, -1])
