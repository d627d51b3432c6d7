"""Membership: the figures against closed forms and scikit-learn, the attacks on models that did and did not learn."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from fedlm.attacks.membership import (
    auc_interval,
    calibrated_scores,
    judge,
    lira_offline,
    lira_online,
    logit_confidence,
    loss_scores,
    losses,
)
from fedlm.errors import PrivacyError
from fedlm.training.sequences import Encoded
from tests.attacks.silo import encoded, overfitted, windows

# figures


def test_two_normals_in_closed_form() -> None:
    """Shift d: AUC is Phi(d / sqrt 2), the true positive rate at 1 % is 1 - Phi(Phi^-1(0.99) - d)."""
    random, shift, n = np.random.default_rng(0), 1.5, 200_000
    found = judge(random.normal(shift, 1, n), random.normal(0, 1, n))
    assert found.auc == pytest.approx(norm.cdf(shift / math.sqrt(2)), abs=0.003)
    assert found.tpr == pytest.approx(1 - norm.cdf(norm.ppf(0.99) - shift), abs=0.006)
    assert found.auc_interval[0] < found.auc < found.auc_interval[1]


def test_as_scikit_learn_with_ties() -> None:
    random = np.random.default_rng(1)
    members, others = random.integers(2, 30, 300) / 4, random.integers(0, 28, 500) / 4
    found = judge(members, others)
    truth = np.repeat([1, 0], [300, 500])
    scores = np.concatenate([members, others])
    assert found.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.tpr == pytest.approx(true[false <= 0.01].max(), abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1.2, 2.5])
def test_intervals_cover(shift: float) -> None:
    """About 95 % of intervals hold the true area; near 1, where a normal approximation would not, too."""
    random, truth = np.random.default_rng(2), norm.cdf(shift / math.sqrt(2))
    covered = 0
    for _ in range(600):
        low, high = judge(random.normal(shift, 1, 30), random.normal(0, 1, 40)).auc_interval
        covered += low <= truth <= high
    assert 0.92 <= covered / 600 <= 0.985


def test_intervals_at_the_ends() -> None:
    low, high = auc_interval(1.0, 10, 10)
    assert high == 1.0 and 0.6 < low < 0.9
    assert auc_interval(0.0, 10, 10) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("auc", [0.5, 0.8, 0.99, 1.0])
def test_an_intervals_ends_are_z_standard_errors_away(auc: float) -> None:
    """By the variance as Hanley and McNeil write it (Radiology 143, 1982), of n and n."""
    n = 25
    for end in auc_interval(auc, n, n):
        if end < 1:
            q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
            variance = (end * (1 - end) + (n - 1) * (q1 - end**2) + (n - 1) * (q2 - end**2)) / n**2
            assert abs(end - auc) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-4)


# likelihood ratios


def test_online_is_the_likelihood_ratio() -> None:
    random = np.random.default_rng(3)
    shadows, inside = random.normal(size=(12, 7)), np.tile(np.arange(12)[:, None] % 2 == 0, (1, 7))
    target = random.normal(size=7)
    a, b = shadows[0::2], shadows[1::2]
    with_it = norm(a.mean(0), a.std(0, ddof=1)).logpdf(target)
    without = norm(b.mean(0), b.std(0, ddof=1))
    np.testing.assert_allclose(lira_online(target, shadows, inside), with_it - without.logpdf(target), rtol=1e-9)
    np.testing.assert_allclose(lira_offline(target, b), without.logcdf(target), rtol=1e-9)


def test_a_shared_variance_is_the_pooled_one() -> None:
    """Squares around each sequence's own mean, over the degrees of freedom that are left; one shadow each is enough
    where others have more."""
    values = np.array([[0.0, 10.0, 5.0], [2.0, 14.0, 5.0]])
    deviation = math.sqrt((2 * 1.0 + 2 * 4.0) / 3)
    expected = norm([1.0, 12.0, 5.0], deviation).logcdf([0.5, 12.0, 9.0])
    np.testing.assert_allclose(lira_offline(np.array([0.5, 12.0, 9.0]), values, shared=True), expected, rtol=1e-12)


def test_it_sees_through_what_is_hard_or_easy() -> None:
    """Losses differ by 5 from text to text and by 1 for members, under noise 1/2: the loss alone sees nearly nothing,
    the ratio Phi(2 / sqrt 2), whether sequences have one variance or each its own."""
    random, n, k = np.random.default_rng(4), 4000, 128
    easy = random.normal(0, 5, n)
    inside = random.random((k, n)) < 0.5
    shadows = easy + inside + random.normal(0, 0.5, (k, n))
    member = np.arange(n) < n // 2
    target = easy + member + random.normal(0, 0.5, n)
    best = norm.cdf(2 / math.sqrt(2))

    def area(scores: np.ndarray) -> float:
        return judge(scores[member], scores[~member]).auc

    assert area(target) < 0.6
    for shared in (True, False):
        assert area(lira_online(target, shadows, inside, shared=shared)) == pytest.approx(best, abs=0.015)
        outside = np.where(inside, shadows - 1, shadows)
        assert area(lira_offline(target, outside, shared=shared)) == pytest.approx(best, abs=0.015)
    few = area(lira_online(target, shadows[:12], np.tile(np.arange(12)[:, None] % 2 == 0, (1, n))))
    assert few < best  # marks that say nothing about membership


def test_logit_confidence_in_hand() -> None:
    p = np.array([0.01, 0.5, 0.99])
    np.testing.assert_allclose(logit_confidence(-np.log(p)), np.log(p / (1 - p)), rtol=1e-12)
    assert logit_confidence(np.array([1e-9]))[0] == pytest.approx(9 * math.log(10), rel=1e-6)


def test_refusals() -> None:
    with pytest.raises(PrivacyError, match="members"):
        judge(np.array([]), np.array([1.0]))
    with pytest.raises(PrivacyError, match="numbers"):
        judge(np.array([math.nan]), np.array([1.0]))
    with pytest.raises(PrivacyError, match="false positive"):
        judge(np.ones(2), np.ones(2), fpr=0.0)
    with pytest.raises(PrivacyError, match="no spread"):
        lira_online(np.ones(2), np.ones((3, 2)), np.zeros((3, 2), bool))
    with pytest.raises(PrivacyError, match="fit together"):
        lira_offline(np.ones(3), np.ones((3, 2)))


# models


@pytest.fixture(scope="module")
def parts(pages: list[str], tokenizer: Any) -> tuple[list[Encoded], list[Encoded]]:
    """Windows of real text, dealt at random to members and others."""
    rows = windows(tokenizer, pages, 32)
    order = np.random.default_rng(0).permutation(len(rows))[:120]
    return [encoded(rows[i]) for i in order[:40]], [encoded(rows[i]) for i in order[40:]]


def test_an_overfitted_model_gives_its_members_away(base: Any, parts: tuple[list[Encoded], list[Encoded]]) -> None:
    """Before training nothing is to be seen; afterwards everything is."""
    members, others = parts
    before = losses(base, members), losses(base, others)
    blind = judge(loss_scores(before[0]), loss_scores(before[1]))
    assert blind.auc_interval[0] < 0.5 < blind.auc_interval[1]
    model = overfitted(base, members, steps=120)
    after = losses(model, members), losses(model, others)
    plain = judge(loss_scores(after[0]), loss_scores(after[1]))
    calibrated = judge(calibrated_scores(after[0], before[0]), calibrated_scores(after[1], before[1]))
    assert plain.auc > 0.9 and plain.tpr > 0.3
    assert calibrated.auc > 0.95 and calibrated.tpr > 0.5
    n, m = len(others[:40]), len(others[40:])
    half = judge(loss_scores(after[1][:n]), loss_scores(after[1][n:]))
    assert abs(half.auc - 0.5) < 3 * ((n + m + 1) / (12 * n * m)) ** 0.5  # among those it never saw; Mann and Whitney


@pytest.mark.figures
def test_lira_on_a_model_that_barely_overfits(base: Any, parts: tuple[list[Encoded], list[Encoded]]) -> None:
    """Few steps: the loss is weak; shadow models of the attacker's own show who was there."""
    members, others = parts
    others = others[:40]
    pool = [*members, *others]
    random = np.random.default_rng(0)
    rows, marks = [], []
    for _ in range(12):
        mark = np.zeros(80, bool)
        mark[random.permutation(80)[:40]] = True
        shadow = overfitted(copy.deepcopy(base), [s for s, m in zip(pool, mark, strict=True) if m], steps=8, rate=2e-3)
        rows.append(-losses(shadow, pool))
        marks.append(mark)
    shadows, inside = np.stack(rows), np.stack(marks)
    target = -losses(overfitted(copy.deepcopy(base), members, steps=8, rate=2e-3), pool)
    online = lira_online(target, shadows, inside, shared=True)
    plain, ratio = judge(target[:40], target[40:]), judge(online[:40], online[40:])
    print("loss", plain, "LiRA", ratio)
    assert ratio.auc > plain.auc and ratio.auc_interval[0] > 0.6
