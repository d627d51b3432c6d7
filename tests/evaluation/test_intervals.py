from __future__ import annotations

import numpy as np
import pytest

from fedlm.evaluation.intervals import bootstrap_mean, student_t, t_cdf, t_quantile, wilson

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (84, 100), (100, 100), (1, 1)])
def test_wilson_equals_scipys(right: int, total: int) -> None:
    theirs = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson(right, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_refuses_nothing_and_nonsense() -> None:
    for right, total in ((0, 0), (3, 2), (-1, 5)):
        with pytest.raises(ValueError, match="successes"):
            wilson(right, total)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31])
def test_students_t_equals_scipys(freedom: int) -> None:
    for t in (0.0, 0.3, 2.0, 8.0):
        assert t_cdf(t, freedom) == pytest.approx(float(stats.t.cdf(t, freedom)), abs=1e-12)
    assert t_quantile(0.975, freedom) == pytest.approx(float(stats.t.ppf(0.975, freedom)), rel=1e-9)


def test_interval_over_seeds_equals_scipys() -> None:
    values = [0.81, 0.84, 0.79]
    theirs = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert student_t(values) == pytest.approx(theirs)
    with pytest.raises(ValueError, match="two seeds"):
        student_t([0.5])


def test_bootstrap_is_repeatable_and_close_to_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = bootstrap_mean(values, seed=0, purpose="x")
    assert (low, high) == bootstrap_mean(values, seed=0, purpose="x")
    assert (low, high) != bootstrap_mean(values, seed=0, purpose="y")
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_bootstrap_of_a_ratio_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        tokens = generator.integers(1, 20, 150)
        nll = tokens * 1.5 + generator.normal(0, 1, 150) * np.sqrt(tokens)
        low, high = bootstrap_mean(nll, tokens, seed=trial, purpose="cover", resamples=400)
        covered += low <= 1.5 <= high
    assert 180 <= covered <= 198


def test_large_inputs_are_drawn_in_chunks_with_the_same_result_each_time() -> None:
    values = np.arange(50_000) % 2
    low, high = bootstrap_mean(values, seed=0, purpose="big", resamples=100)
    assert low < 0.5 < high < 0.51
