"""Tokens drawn anew: the guarantee exactly, on a vocabulary that can be written out, and what is drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chisquare

from fedlm.errors import PrivacyError
from fedlm.privacy.stream import SecretStream
from fedlm.privacy.text import Vocabulary, perturbed, probabilities, responded, uniform, vocabulary

SECRET = bytes(range(32))
TOKENS, WIDTH = 40, 5


@pytest.fixture(scope="module")
def space() -> Vocabulary:
    """Forty tokens, of which 36 and 37 are alike, 38 and 39 are special, and 35 is the mean of all."""
    points = np.random.default_rng(0).normal(size=(TOKENS, WIDTH)).astype(np.float32)
    points[37] = points[36]
    points[35] = (points.sum(axis=0) - points[35]) / (TOKENS - 1)
    return vocabulary(points, np.arange(38))


def every(space: Vocabulary) -> NDArray[np.int64]:
    return np.arange(len(space.embeddings))


def test_distances_are_half_those_of_unit_vectors(space: Vocabulary) -> None:
    """Pair by pair; a metric between 0 and 1."""
    found = space.distances(every(space))
    norms = np.linalg.norm(space.embeddings.astype(np.float64), axis=1, keepdims=True)
    units = np.where(norms > 1e-5, space.embeddings / norms, 0.0)
    for x in range(TOKENS):
        for y in range(38):
            whole = np.linalg.norm(units[x] - units[y]) / 2
            assert found[x, y] == pytest.approx(whole, abs=1e-7 if y != 35 and x != 35 else 1)
    assert found.min() >= 0 and found.max() <= 1 and (np.diag(found[:38]) == 0).all() and found[36, 37] < 1e-7
    square = found[:38]
    assert (square[:, None, :] <= square[:, :, None] + square[None, :, :] + 1e-7).all(), "the triangle inequality"


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 40.0, 100.0])
def test_no_two_tokens_are_told_apart_by_more(space: Vocabulary, epsilon: float) -> None:
    """P(y|x) / P(y|x') <= exp(epsilon d(x, x')) <= exp(epsilon), for all x, x' and y, from the closed form."""
    tokens = np.array([t for t in range(38) if t not in (36, 37)])  # of equal ones see the test above
    distances = space.distances(tokens)
    chances = probabilities(distances, epsilon)
    closed = np.exp(-epsilon / 2 * distances) / np.exp(-epsilon / 2 * distances).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(chances, closed, rtol=1e-12)
    logs = np.log(chances)
    ratios = (logs[:, None, :] - logs[None, :, :]).max(axis=2)
    between = distances[:, tokens]
    assert (ratios <= epsilon * between + 1e-9).all() and (ratios <= epsilon + 1e-9).all()
    assert ratios.max() > 0.3 * epsilon * between.max(), "the bound is no idle one"


def test_what_is_drawn_has_these_probabilities(space: Vocabulary) -> None:
    count, epsilon = 40_000, 6.0
    for token in (3, 38):  # also what is never drawn itself
        ids = np.full(count, token)
        drawn = perturbed(ids, uniform(SecretStream(SECRET, "test", token), count), space, epsilon)
        expected = probabilities(space.distances(np.array([token])), epsilon)[0] * count
        assert chisquare(np.bincount(drawn, minlength=38), expected).pvalue > 1e-3
        assert drawn.max() < 38


def test_a_draw_is_the_inverse_of_the_distribution_to_the_last_digit(space: Vocabulary) -> None:
    """Also of the rarest token, whose probability is far below the spacing of floats near 1."""
    epsilon = 90.0
    chances = probabilities(space.distances(np.array([3])), epsilon)[0]
    order = np.argsort(chances, kind="stable")
    assert chances[order[0]] < 1e-15
    ends = [math.fsum(chances[order[: i + 1]]) for i in range(38)]
    for i in (0, 1, 17, 30):
        below, above = ends[i] * (1 - 1e-9), ends[i] * (1 + 1e-9)
        drawn = perturbed(np.array([3, 3]), np.array([below, above]), space, epsilon)
        assert drawn.tolist() == [order[i], order[i + 1]]


def test_each_place_has_its_own_draw_whatever_stands_beside_it(space: Vocabulary) -> None:
    ids, draws = np.random.default_rng(1).integers(0, TOKENS, 500), uniform(SecretStream(SECRET, "a"), 500)
    whole = perturbed(ids, draws, space, 5.0)
    parts = np.concatenate([perturbed(ids[i : i + 7], draws[i : i + 7], space, 5.0) for i in range(0, 500, 7)])
    assert (whole == parts).all() and perturbed(ids[:0], draws[:0], space, 5.0).size == 0


def test_large_epsilon_keeps_the_text_and_small_forgets_it(space: Vocabulary) -> None:
    ids, draws = np.arange(34).repeat(50), uniform(SecretStream(SECRET, "b"), 34 * 50)
    kept = [float((perturbed(ids, draws, space, epsilon) == ids).mean()) for epsilon in (0.01, 100.0)]
    assert kept[0] < 0.06 and kept[1] > 0.95


def test_uniform_numbers_fill_the_small_end() -> None:
    found = uniform(SecretStream(SECRET, "u"), 200_000)
    assert found.min() >= 0 and found.max() < 1 and abs(found.mean() - 0.5) < 0.003
    assert chisquare(np.bincount((found * 64).astype(int), minlength=64)).pvalue > 1e-3


@pytest.mark.parametrize("choices", [2, 3, 7])
def test_randomised_response_in_closed_form(choices: int) -> None:
    """The share of [0, 1) that gives each answer, and its largest ratio between two truths, which is e^epsilon."""
    epsilon, steps = 1.5, 60_000
    shares = np.zeros((choices, choices))
    for truth in range(choices):
        for draw in (np.arange(steps) + 0.5) / steps:
            shares[truth, responded(truth, choices, float(draw), epsilon)] += 1 / steps
    right = math.exp(epsilon) / (math.exp(epsilon) + choices - 1)
    np.testing.assert_allclose(np.diag(shares), right, atol=1e-3)
    assert (shares.max(axis=0) / shares.min(axis=0)).max() == pytest.approx(math.exp(epsilon), rel=5e-3)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, math.nan])
def test_impossible_budgets_are_refused_in_a_sentence(space: Vocabulary, epsilon: float) -> None:
    for attempt in (
        lambda: perturbed(np.array([1]), np.array([0.5]), space, epsilon),
        lambda: probabilities(np.zeros((1, 2)), epsilon),
        lambda: responded(0, 2, 0.5, epsilon),
    ):
        with pytest.raises(PrivacyError, match="per token is none: it must be above 0 and finite"):
            attempt()


def test_a_vocabulary_that_is_none_is_refused() -> None:
    points = np.ones((3, 2), np.float32)
    with pytest.raises(PrivacyError, match="1 token"):
        vocabulary(points, np.array([1]))
    points[1, 1] = np.nan
    with pytest.raises(PrivacyError, match="not finite"):
        vocabulary(points, np.arange(3))
