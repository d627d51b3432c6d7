"""A lower bound on epsilon from one training run with canaries.

Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023. Each of m canaries is included
with probability 1/2, independently; after training an auditor guesses for r of them whether they were, and is right v
times. How many guesses, and which, may depend on the trained model, not on the truth. Only arithmetic is here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc, expit, gammaln

from fedlm.errors import PrivacyError

HIGHEST = 64.0
"""Epsilon beyond which no audit is asked."""


@dataclass(frozen=True)
class Audit:
    """What an auditor counted.

    Args:
        canaries: m, each included with probability 1/2; each is a unit of its own.
        guesses: r, up to m.
        correct: v, up to r.
    """

    canaries: int
    guesses: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.guesses <= self.canaries:
            raise PrivacyError(
                f"{self.correct} correct of {self.guesses} guesses about {self.canaries} canaries are no audit",
                fix="canaries are at least as many as guesses, and guesses as many as correct ones",
            )


def p_value(audit: Audit, epsilon: float, delta: float) -> float:
    """The probability, at most, that so many guesses are right although training is (epsilon, delta)-private.

    Corollary 5.4 of the paper: with q = e^epsilon / (1 + e^epsilon) and f(x) = P[Binomial(r, q) >= x],
    f(v) + 2 m delta max_i (f(v - i) - f(v)) / i, i = 1, ..., v.

    Raises:
        PrivacyError: epsilon is negative, or delta not within [0, 1).
    """
    if not epsilon >= 0 or not 0 <= delta < 1:
        raise PrivacyError(f"epsilon {epsilon} and delta {delta} are no privacy guarantee")
    tail = _tail(audit, epsilon)
    if delta == 0 or audit.correct == 0:
        return tail
    # f(v - i) - f(v) is the probability of v-i, ..., v-1 right: sums from v-1 downwards.
    right = np.arange(audit.correct - 1, -1, -1, dtype=np.float64)
    wrong = audit.guesses - right
    log_choices = gammaln(audit.guesses + 1.0) - gammaln(right + 1) - gammaln(wrong + 1)
    log_odds = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    sums = np.cumsum(np.exp(log_choices + right * log_odds[0] + wrong * log_odds[1]))
    slack = float((sums / np.arange(1, audit.correct + 1)).max())
    return min(1.0, tail + 2 * audit.canaries * delta * slack)


def epsilon_at_least(audit: Audit, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon that the audit refutes: training is not (epsilon, delta)-private, or something happened whose
    probability is at most 1 - confidence. 0 where nothing is refuted.

    Raises:
        PrivacyError: confidence or delta are not within (0, 1) and [0, 1).
    """
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence is {confidence}; it must be above 0 and below 1")
    level = 1 - confidence
    if p_value(audit, 0.0, delta) >= level:
        return 0.0
    # Whatever is refuted refutes all below it, so the lower end is always an answer.
    low, high = 0.0, 1.0
    while high < HIGHEST and p_value(audit, high, delta) < level:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        if p_value(audit, middle, delta) < level:
            low = middle
        else:
            high = middle
    return low


def simultaneous(audits: Sequence[Audit], delta: float, confidence: float = 0.95) -> list[float]:
    """A bound from each audit, all of them right at once with this confidence (Bonferroni): the largest may be quoted.

    It is what to use where several numbers of guesses were tried on one run, and the best is kept.
    """
    if not audits:
        raise PrivacyError("there are no audits")
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence is {confidence}; it must be above 0 and below 1")
    each = 1 - (1 - confidence) / len(audits)
    return [epsilon_at_least(audit, delta, each) for audit in audits]


def _tail(audit: Audit, epsilon: float) -> float:
    """P[Binomial(r, q) >= v], by the regularised incomplete beta function."""
    if audit.correct == 0:
        return 1.0
    return float(betainc(audit.correct, audit.guesses - audit.correct + 1, expit(epsilon)))
