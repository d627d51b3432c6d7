"""Strategy matrices: sensitivities against a search over all patterns, noise against a linear solve, the tree against
`dp-accounting`."""

from __future__ import annotations

from itertools import combinations, pairwise

import dp_accounting
import numpy as np
import pytest

from fedlm.errors import PrivacyError
from fedlm.privacy.accounting import ORDERS, _renyi
from fedlm.privacy.matrix import Matrix, as_gaussian, banded_square_root, binary_tree, correlated, sensitivity


def searched(strategy: Matrix, participations: int, separation: int) -> float:
    """Over all patterns, contributions all alike: the worst case where columns are orthogonal."""
    steps = strategy.shape[1]
    patterns = (
        pattern
        for k in range(1, participations + 1)
        for pattern in combinations(range(steps), k)
        if all(b - a >= separation for a, b in pairwise(pattern))
    )
    return max(float(np.linalg.norm(strategy[:, list(pattern)].sum(axis=1))) for pattern in patterns)


@pytest.mark.parametrize(
    ("steps", "bands", "separation", "participations"), [(9, 3, 3, 3), (10, 2, 4, 2), (8, 1, 1, 8), (7, 4, 5, 1)]
)
def test_sensitivity_of_banded_strategies(steps: int, bands: int, separation: int, participations: int) -> None:
    strategy = banded_square_root(steps, bands)
    found = sensitivity(strategy, participations, separation)
    assert found == pytest.approx(searched(strategy, participations, separation))


def test_uneven_columns_need_the_best_choice() -> None:
    """The best set of columns is not the greedy one: 4 + 4 of columns 0 and 2 beat 5 of column 1 and 1 of column 3."""
    strategy = np.diag(np.sqrt([4.0, 5.0, 4.0, 1.0]))
    assert sensitivity(strategy, 2, 2) == pytest.approx(np.sqrt(8))
    assert sensitivity(strategy, 1, 2) == pytest.approx(np.sqrt(5))
    assert sensitivity(strategy, 4, 1) == pytest.approx(np.sqrt(14))


def test_identity_is_dp_sgd_without_sampling() -> None:
    found = as_gaussian(banded_square_root(16, 1), 3.0, 16, 1, "silo", "zero-out")
    assert found.noise_multiplier == pytest.approx(3.0 / 4)


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9])
def test_the_tree_costs_what_dp_accounting_says(steps: int) -> None:
    """Its event for `steps` leaves counts ceil(log2(steps + 1)) levels of complete subtrees; ours also the root
    above."""
    tree = as_gaussian(binary_tree(steps), 4.0, 1, 1, "example", "zero-out")
    accountant = dp_accounting.rdp.RdpAccountant(ORDERS, dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
    theirs = accountant.compose(dp_accounting.SingleEpochTreeAggregationDpEvent(4.0, steps)).rdp
    levels = {1: (1, 1), 2: (2, 2), 7: (3, 4), 8: (4, 4), 9: (4, 5)}[steps]
    np.testing.assert_allclose(_renyi(tree) * levels[0] / levels[1], theirs, rtol=1e-9)


@pytest.mark.parametrize("bands", [1, 3, 12])
def test_correlated_noise_is_the_solution(bands: int) -> None:
    strategy = banded_square_root(12, bands)
    fresh = np.random.default_rng(0).standard_normal((12, 5))
    found = np.array(list(correlated(strategy, iter(fresh))))
    np.testing.assert_allclose(found, np.linalg.solve(strategy, fresh), atol=1e-12)


def test_square_root_squares_to_the_sum() -> None:
    whole = banded_square_root(20, 20)
    np.testing.assert_allclose(whole @ whole, np.tril(np.ones((20, 20))), atol=1e-12)


def test_correlation_pays() -> None:
    """Error of prefix sums at equal privacy, one participation: below independent noise's, and below the tree's."""
    summing = np.tril(np.ones((64, 64)))

    def error(bands: int) -> float:
        strategy = banded_square_root(64, bands)
        return float(np.linalg.norm(summing @ np.linalg.inv(strategy))) * sensitivity(strategy, 1, 64)

    assert error(64) < error(8) < 0.6 * error(1)


def test_refusals() -> None:
    with pytest.raises(PrivacyError, match="overlaps"):
        sensitivity(banded_square_root(8, 3), 2, 2)
    with pytest.raises(PrivacyError, match="triangular"):
        sensitivity(np.ones((4, 4)), 2, 2)
    with pytest.raises(PrivacyError, match="pattern"):
        sensitivity(np.eye(4), 5, 1)
    with pytest.raises(PrivacyError, match="bands"):
        banded_square_root(4, 5)
    with pytest.raises(PrivacyError, match="diagonal"):
        next(correlated(np.tril(np.ones((3, 3)), -1), iter(np.ones((3, 1)))))
