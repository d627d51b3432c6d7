"""Poisson sampling by its distribution."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedlm.errors import TrainingError
from fedlm.training.private.sampling import cyclic_batches, poisson_batches


def drawn(examples: int, rate: float, steps: int, seed: int = 0) -> np.ndarray:
    """bool [steps, examples]: who takes part."""
    table = np.zeros((steps, examples), bool)
    for step, chosen in enumerate(poisson_batches(examples, rate, steps, np.random.default_rng(seed))):
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
        table[step, chosen] = True
    return table


def test_each_takes_part_by_itself_with_the_rate() -> None:
    """Sizes are binomial; an example's and two neighbours' takings-part are independent (chi-square, p > 1e-3)."""
    table = drawn(40, 0.2, 4000)
    sizes = np.bincount(table.sum(1), minlength=41)
    expected = 4000 * stats.binom(40, 0.2).pmf(np.arange(41))
    usual = expected > 5
    observed = [*sizes[usual], sizes[~usual].sum()]
    assert stats.chisquare(observed, [*expected[usual], expected[~usual].sum()]).pvalue > 1e-3
    assert stats.binomtest(int(table.sum()), table.size, 0.2).pvalue > 1e-3
    for other in (table[:, 1:], table[1:, :]):
        same = table[:, :-1] if other.shape[1] == 39 else table[:-1, :]
        counts = [[(same & other).sum(), (same & ~other).sum()], [(~same & other).sum(), (~same & ~other).sum()]]
        assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_same_generator_same_batches_and_empty_ones_come_up() -> None:
    assert (drawn(9, 0.1, 200) == drawn(9, 0.1, 200)).all()
    assert (drawn(9, 0.1, 200) != drawn(9, 0.1, 200, seed=1)).any()
    assert (drawn(9, 0.1, 200).sum(1) == 0).any()
    assert drawn(9, 1.0, 3).all()


@pytest.mark.parametrize(("examples", "rate", "steps"), [(5, 0.0, 1), (5, 1.1, 1), (0, 0.5, 1), (5, 0.5, 0)])
def test_refusals(examples: int, rate: float, steps: int) -> None:
    with pytest.raises(TrainingError):
        poisson_batches(examples, rate, steps, np.random.default_rng(0))


@pytest.mark.parametrize(("units", "batches"), [(7, 3), (9, 3), (5, 5), (6, 1)])
def test_in_a_cycle_each_comes_back_after_exactly_one_pass(units: int, batches: int) -> None:
    """Over rounds of four steps that are asked for one after the other, as over all at once."""
    rounds = [list(cyclic_batches(units, batches, 4 * r, 4, np.random.default_rng(3))) for r in range(4)]
    steps = [set(batch.tolist()) for found in rounds for batch in found]
    whole = list(cyclic_batches(units, batches, 0, 16, np.random.default_rng(3)))
    assert steps == [set(batch.tolist()) for batch in whole]
    assert {len(batch) for batch in whole} <= {units // batches, -(-units // batches)}
    for unit in range(units):
        mine = [step for step, batch in enumerate(steps) if unit in batch]
        assert mine == list(range(mine[0], 16, batches)) and mine[0] < batches


def test_no_cycle_without_units() -> None:
    for units, batches, steps in ((3, 4, 1), (3, 0, 1), (3, 2, 0)):
        with pytest.raises(TrainingError, match="cannot be taken in"):
            cyclic_batches(units, batches, 0, steps, np.random.default_rng(0))
