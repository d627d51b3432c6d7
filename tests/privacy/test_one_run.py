"""The one-run audit: figures printed in the paper, exact tails, and simulated randomised response."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fedlm.errors import PrivacyError
from fedlm.privacy.one_run import Audit, epsilon_at_least, p_value, simultaneous


@pytest.mark.parametrize(
    ("audit", "delta", "printed"),
    [
        (Audit(100, 100, 75), 0.0, 0.702),
        (Audit(100, 100, 75), 1e-4, 0.699),
        (Audit(1000, 100, 75), 1e-4, 0.673),
        (Audit(100_000, 1510, 1439), 1e-5, 2.675),
    ],
)
def test_figures_of_the_paper(audit: Audit, delta: float, printed: float) -> None:
    """Appendix D and section 7; the paper cuts or rounds its last digit."""
    assert epsilon_at_least(audit, delta) == pytest.approx(printed, abs=1e-3)


def test_p_value_of_the_paper() -> None:
    assert p_value(Audit(100, 100, 75), math.log(3), 0.0) == pytest.approx(0.553, abs=5e-4)


@pytest.mark.parametrize(("guesses", "correct", "odds"), [(20, 13, 2), (9, 9, 5), (12, 1, 1), (12, 0, 3)])
def test_against_exact_fractions(guesses: int, correct: int, odds: int) -> None:
    """Corollary 5.4 in rational arithmetic, maximum and all."""
    q, delta, canaries = Fraction(odds, odds + 1), Fraction(1, 1000), 30

    def tail(least: int) -> Fraction:
        return sum(
            (
                Fraction(math.comb(guesses, k)) * q**k * (1 - q) ** (guesses - k)
                for k in range(max(0, least), guesses + 1)
            ),
            Fraction(0),
        )

    slack = max(((tail(correct - i) - tail(correct)) / i for i in range(1, canaries + 1)), default=Fraction(0))
    exact = min(Fraction(1), tail(correct) + 2 * canaries * delta * slack)
    assert p_value(Audit(canaries, guesses, correct), math.log(odds), float(delta)) == pytest.approx(
        float(exact), rel=1e-10
    )


def test_all_guesses_right_in_closed_form() -> None:
    """q^r = 1 - confidence."""
    assert epsilon_at_least(Audit(16, 16, 16), 0.0) == pytest.approx(-math.log(0.05 ** (-1 / 16) - 1), abs=1e-9)


def test_randomised_response_is_recovered_and_rarely_exceeded() -> None:
    """Each canary's bit is published, right with probability e^eps / (1 + e^eps): the audit may exceed epsilon in 5 %
    of runs, and comes near it."""
    random, epsilon, canaries = np.random.default_rng(0), 2.0, 2000
    right = random.binomial(canaries, 1 / (1 + math.exp(-epsilon)), size=400)
    found = np.array([epsilon_at_least(Audit(canaries, canaries, int(v)), 0.0) for v in right])
    exceeded = float((found > epsilon).mean())
    assert exceeded <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert exceeded > 0.005  # the bound is tight for this mechanism
    assert np.median(found) > 0.9 * epsilon
    assert abs(epsilon_at_least(Audit(10**6, 10**6, round(10**6 / (1 + math.exp(-epsilon)))), 0.0) - epsilon) < 0.01


def test_coins_refute_nothing_and_delta_weakens() -> None:
    assert epsilon_at_least(Audit(1000, 1000, 500), 0.0) == 0.0
    assert epsilon_at_least(Audit(10, 0, 0), 1e-5) == 0.0
    bounds = [epsilon_at_least(Audit(1000, 500, 450), delta) for delta in (0.0, 1e-6, 1e-5, 1e-4, 1e-2)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > bounds[3] > bounds[4]


def test_bonferroni() -> None:
    """Of three audits each holds at a third of the error; of audits without any truth in them, 5 % of *families*
    err."""
    audits = [Audit(1000, 100, 80), Audit(1000, 200, 150), Audit(1000, 400, 270)]
    found = simultaneous(audits, 1e-5, 0.95)
    assert found == [epsilon_at_least(audit, 1e-5, 1 - 0.05 / 3) for audit in audits]
    assert all(bound < epsilon_at_least(audit, 1e-5) for bound, audit in zip(found, audits, strict=True))

    random, epsilon = np.random.default_rng(5), 1.0
    families = random.binomial(200, 1 / (1 + math.exp(-epsilon)), size=(300, 5))
    worst = [max(simultaneous([Audit(200, 200, int(v)) for v in family], 0.0)) for family in families]
    assert np.mean(np.array(worst) > epsilon) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)
    alone = [max(epsilon_at_least(Audit(200, 200, int(v)), 0.0) for v in family) for family in families]
    assert np.mean(np.array(alone) > epsilon) > 0.08  # without it, too many err


def test_refusals() -> None:
    for counts in ((10, 11, 5), (10, 5, 6), (10, 5, -1)):
        with pytest.raises(PrivacyError, match="no audit"):
            Audit(*counts)
    with pytest.raises(PrivacyError, match="confidence"):
        epsilon_at_least(Audit(10, 5, 5), 0.0, 1.0)
    with pytest.raises(PrivacyError, match="guarantee"):
        p_value(Audit(10, 5, 5), -1.0, 0.0)
    with pytest.raises(PrivacyError, match="no audits"):
        simultaneous([], 0.0)
