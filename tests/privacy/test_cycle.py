"""DP-FTRL in cyclic order: sensitivity against all participations, epsilon against `dp-accounting`, noise against C."""

from __future__ import annotations

import math
from itertools import product

import dp_accounting
import numpy as np
import pytest

from fedlm.errors import PrivacyError
from fedlm.privacy.cycle import BLOCK, MOST_BANDS, CorrelatedNoise, plan
from fedlm.privacy.matrix import (
    banded_square_root,
    best_bands,
    correlated,
    prefix_error,
    sensitivity,
    sensitivity_of,
    solved,
    square_root,
)
from fedlm.training.private.sampling import cyclic_batches
from tests.privacy.test_matrix import searched

SECRET = bytes(range(32))


@pytest.mark.parametrize(
    ("steps", "bands", "separation", "participations"), [(9, 3, 3, 3), (10, 2, 4, 2), (8, 1, 1, 8), (7, 4, 5, 1)]
)
def test_coefficients_say_what_the_matrix_says(steps: int, bands: int, separation: int, participations: int) -> None:
    strategy, coefficients = banded_square_root(steps, bands), square_root(steps, bands)
    found = sensitivity_of(coefficients, steps, participations, separation)
    assert found == pytest.approx(sensitivity(strategy, participations, separation), rel=1e-12)
    assert found == pytest.approx(searched(strategy, participations, separation), rel=1e-12)
    fresh = np.random.default_rng(0).standard_normal((steps, 5))
    rows = np.array(list(solved(coefficients, iter(fresh))))
    np.testing.assert_allclose(rows, np.array(list(correlated(strategy, iter(fresh)))), atol=1e-12)
    sums = np.tril(np.ones((steps, steps))) @ np.linalg.inv(strategy)
    assert prefix_error(coefficients, steps) == pytest.approx(np.linalg.norm(sums) / math.sqrt(steps), rel=1e-12)
    assert prefix_error(square_root(steps, 1), steps) == pytest.approx(math.sqrt((steps + 1) / 2), rel=1e-12)


@pytest.mark.parametrize(("units", "batch", "steps"), [(7, 2, 10), (9, 3, 7), (5, 5, 4), (11, 2, 6)])
def test_sensitivity_is_that_of_the_worst_unit(units: int, batch: int, steps: int) -> None:
    """By force: every unit's steps as they are taken, contributions of norm 1 with all signs, and 200 of any direction
    in three dimensions. None moves C x further than the plan says, and one does so exactly."""
    found = plan("example", units, batch, steps, 2.0, 1e-3)
    assert found.mechanism.noise_multiplier is not None
    claimed = found.deviation / found.mechanism.noise_multiplier
    strategy = banded_square_root(steps, found.bands)
    taken = list(cyclic_batches(units, found.batches, 0, steps, np.random.default_rng(0)))
    generator, most = np.random.default_rng(1), 0.0
    for unit in range(units):
        mine = [step for step, batch_ in enumerate(taken) if unit in batch_]
        for signs in product((-1.0, 1.0), repeat=len(mine)):
            x = np.zeros(steps)
            x[mine] = signs
            most = max(most, float(np.linalg.norm(strategy @ x)))
        for _ in range(200):
            directions = generator.standard_normal((len(mine), 3))
            x = np.zeros((steps, 3))
            x[mine] = directions / np.linalg.norm(directions, axis=1, keepdims=True)
            assert np.linalg.norm(strategy @ x) <= claimed * (1 + 1e-12)
    assert most == pytest.approx(claimed, rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_whole_run_is_one_gaussian(epsilon: float) -> None:
    """dp-accounting's exact epsilon of one Gaussian at the noise multiplier is the budget, however many steps."""
    for steps in (3, 40):
        found = plan("user", 100, 10, steps, epsilon, 1e-4)
        assert found.mechanism.count == 1 and found.mechanism.noise_multiplier is not None
        exact = dp_accounting.get_epsilon_gaussian(found.mechanism.noise_multiplier, 1e-4)
        assert exact == pytest.approx(epsilon, rel=1e-3) and exact <= epsilon
        assert (found.batches, found.expected) == (10, 10.0)


def test_noise_has_the_covariance_of_the_strategy() -> None:
    """C^-1 C^-T over the steps, each entry within five standard errors of 200,000 numbers; and that of sums as well."""
    cycle, count = plan("example", 12, 2, 10, 2.0, 1e-3, bands=4), 200_000
    draw = CorrelatedNoise(cycle, SECRET, ("run", "silo"), 0)
    rows = np.array([draw("w", count) for _ in range(cycle.steps)])
    inverse = np.linalg.inv(banded_square_root(10, 4))
    for weights in (np.eye(10), np.tril(np.ones((10, 10)))):
        true, found = weights @ inverse @ inverse.T @ weights.T, weights @ rows @ rows.T @ weights.T / count
        error = np.sqrt((np.outer(np.diag(true), np.diag(true)) + true**2) / count)
        assert (np.abs(found - true) < 5 * error).all()
    assert true[-1, -1] < 0.3 * 10  # independent noise of ten steps adds up to 10


def test_what_comes_later_is_the_same_wherever_one_begins() -> None:
    cycle = plan("example", 12, 2, 10, 2.0, 1e-3)
    whole, late = (CorrelatedNoise(cycle, SECRET, ("run", "silo"), first) for first in (0, 7))
    rows = [whole("w", 5000) for _ in range(10)]
    for step in (7, 8, 9):
        assert np.array_equal(late("w", 5000), rows[step])
    with pytest.raises(PrivacyError, match="10 steps are used up"):
        late("w", 5000)


def test_a_number_has_its_noise_whatever_else_there_is() -> None:
    """In a round that trains fewer numbers, or other parameters, each still has its own."""
    cycle = plan("example", 12, 2, 10, 2.0, 1e-3)
    several, single = (CorrelatedNoise(cycle, SECRET, ("run", "silo"), 0) for _ in range(2))
    for _ in range(3):
        several("a", 10)
        assert np.array_equal(several("b", BLOCK + 7)[: BLOCK + 1], single("b", BLOCK + 1))
    assert not np.array_equal(several("c", 10), several("d", 10))
    with pytest.raises(PrivacyError, match="'b' had 4103 numbers"):
        several("b", 5)
    for place in (("run", "other"), ("other", "silo")):
        assert not np.array_equal(
            CorrelatedNoise(cycle, SECRET, place, 0)("a", 9), CorrelatedNoise(cycle, SECRET, ("run", "silo"), 0)("a", 9)
        )


def test_the_bands_with_the_least_error_are_taken() -> None:
    def error(steps: int, times: int, separation: int, bands: int) -> float:
        coefficients = square_root(steps, bands)
        return sensitivity_of(coefficients, steps, times, separation) * prefix_error(coefficients, steps)

    found = best_bands(100, 5, 20, 32)
    assert error(100, 5, 20, found) == min(error(100, 5, 20, b) for b in (1, 2, 4, 8, 16, 20))
    assert error(100, 5, 20, found) < 0.4 * error(100, 5, 20, 1)
    assert best_bands(500, 5, 100, MOST_BANDS) == MOST_BANDS and best_bands(5, 5, 1, MOST_BANDS) == 1


def test_refusals() -> None:
    with pytest.raises(PrivacyError, match="each of 12 examples takes part every 6 steps"):
        plan("example", 12, 2, 10, 2.0, 1e-3, bands=7)
    with pytest.raises(PrivacyError, match=r"delta is 0\.1; it must be above 0 and below 1/12"):
        plan("example", 12, 2, 10, 2.0, 0.1)
    with pytest.raises(PrivacyError, match="are no training"):
        plan("example", 0, 2, 10, 2.0, 1e-3)
    with pytest.raises(PrivacyError, match="step 10 is beyond the 10 steps"):
        CorrelatedNoise(plan("example", 12, 2, 10, 2.0, 1e-3), SECRET, ("run",), 10)
    with pytest.raises(PrivacyError, match="overlap"):
        sensitivity_of(square_root(9, 4), 9, 3, 3)
    with pytest.raises(PrivacyError, match="no pattern"):
        sensitivity_of(square_root(9, 4), 9, 10, 4)
