"""Canaries: exposure against its definition, and of a model that learned them; the empirical epsilon of mechanisms
whose epsilon is known."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedlm.attacks.canaries import Space, coins, empirical_epsilon, exposure, exposures
from fedlm.attacks.membership import losses
from fedlm.errors import PrivacyError
from fedlm.training.sequences import Encoded
from tests.attacks.silo import encoded, overfitted, windows


def test_exposure_in_hand() -> None:
    """The likeliest of 1024 has 10 bits, the second 9, the last none; ties count against it."""
    values = np.arange(1024.0)
    assert [exposure(v, values) for v in (0.0, 1.0, 1023.0)] == [10.0, 9.0, 0.0]
    assert exposure(3.0, np.full(64, 3.0)) == 0.0
    with pytest.raises(PrivacyError, match="own"):
        exposure(-1.0, values)


def test_exposure_of_chance_is_geometric() -> None:
    """Ranks drawn evenly: more than k bits with probability 2^-k; the mean is log2(e) = 1.44 bits."""
    random = np.random.default_rng(0)
    found = np.array([exposure(v[0], v) for v in random.random((4000, 1000))])
    for k in (1, 2, 4):
        assert (found > k).mean() == pytest.approx(2.0**-k, abs=0.02)
    assert found.mean() == pytest.approx(math.log2(math.e), abs=0.08)


def test_spaces() -> None:
    space = Space("My number is {}.", "01", 3)
    assert len(space) == 8 and sorted(space.secrets())[:2] == ["000", "001"]
    assert space.text("101") == "My number is 101."
    drawn = space.drawn(8, seed=0)
    assert sorted(drawn) == sorted(space.secrets()) and drawn != space.drawn(8, seed=1)
    with pytest.raises(PrivacyError, match="8 secrets"):
        space.drawn(9, seed=0)
    for wrong in ({"form": "no place"}, {"form": "{}", "alphabet": "aa"}, {"form": "{}", "length": 0}):
        with pytest.raises(PrivacyError, match="place"):
            Space(**wrong)  # type: ignore[arg-type]


@pytest.fixture
def learning(tokenizer: Any, pages: list[str]) -> tuple[Any, list[Encoded]]:
    """How texts are encoded, and rows of real text of 24 tokens."""
    return lambda text: encoded(tokenizer.encode(text)), [encoded(ids) for ids in windows(tokenizer, pages, 24)[:30]]


def test_a_learnt_canary_is_exposed_and_one_left_out_is_not(base: Any, learning: tuple[Any, list[Encoded]]) -> None:
    """Of 1000 secrets; the form itself is learnt for all of them."""
    encode, _ = learning
    space = Space("the bank code {}", "0123456789", 3)
    inside, outside = (found := space.drawn(24, seed=3))[:6], found[6:]
    assert np.mean(exposures(base, space, found, encode)) < 4
    model = overfitted(base, [encode(space.text(s)) for s in inside], steps=150)
    bits = exposures(model, space, found, encode)
    assert np.mean(bits[:6]) > 7 and min(bits[:6]) > 6
    assert np.mean(bits[6:]) < 4 and len(outside) == 18


def test_exposures_rank_summed_losses(base: Any, learning: tuple[Any, list[Encoded]]) -> None:
    encode, _ = learning
    space = Space("a {} b", "en", 4)
    texts = [encode(space.text(s)) for s in space.secrets()]
    assert len({t.targets for t in texts}) > 1  # "en" is one token
    sums = [float(losses(base, [t])[0]) * t.targets for t in texts]
    order = sorted(range(16), key=lambda i: sums[i])
    secrets = list(space.secrets())
    found = exposures(base, space, [secrets[i] for i in order], encode)
    np.testing.assert_allclose(found, [4 - math.log2(rank) for rank in range(1, 17)])
    with pytest.raises(PrivacyError, match="not of"):
        exposures(base, space, ["99"], encode)
    with pytest.raises(PrivacyError, match="too many"):
        exposures(base, Space("{}", length=7), [], encode)


# one run


def test_randomised_response_is_not_overrated_and_nearly_reached() -> None:
    """Scores that are the coin, flipped with probability 1 / (1 + e^eps): in 5 % of runs at most more than eps."""
    random, epsilon, found = np.random.default_rng(1), 1.5, []
    for seed in range(200):
        included = coins(2000, seed)
        kept = random.random(2000) < 1 / (1 + math.exp(-epsilon))
        found.append(empirical_epsilon(np.where(kept, included, ~included) + 0.0, included, 0.0).epsilon)
    assert np.mean(np.array(found) > epsilon) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert np.median(found) > 0.8 * epsilon


def test_certainty_refutes_what_the_number_of_canaries_allows() -> None:
    """All right: q^m = 0.05 / 4 for four numbers of guesses."""
    included = coins(400, seed=0)
    scores = np.where(included, 1.0, -1.0) + np.linspace(0, 0.1, 400)
    balanced = empirical_epsilon(scores, included, 0.0)
    q = (0.05 / 4) ** (1 / balanced.guesses)
    assert balanced.correct == balanced.guesses
    assert balanced.epsilon == pytest.approx(math.log(q / (1 - q)), abs=1e-6)
    noise = np.random.default_rng(2).random(400)
    assert empirical_epsilon(noise, included, 1e-5).epsilon < 0.3


def test_coins_are_fair_and_keyed() -> None:
    assert coins(20_000, 0).mean() == pytest.approx(0.5, abs=0.02)
    assert (coins(200, 1) == coins(200, 1)).all() and (coins(200, 1) != coins(200, 2)).any()
    with pytest.raises(PrivacyError, match="too little"):
        coins(99, 0)
    with pytest.raises(PrivacyError, match="too little"):
        empirical_epsilon(np.zeros(50), np.zeros(50, bool), 0.0)


def test_training_without_privacy_is_refuted(base: Any, tokenizer: Any) -> None:
    """100 canaries of which a model learned those that were in: no epsilon below 2 is true of that."""
    space = Space("the account of {} is closed", "abcdefghij", 5)
    rows = [encoded(tokenizer.encode(space.text(secret))) for secret in space.drawn(600, seed=5)]
    length = np.bincount([len(row) for row in rows]).argmax()
    rows = [row for row in rows if len(row) == length][:100]
    included = coins(100, seed=6)
    before = losses(base, rows)
    unlearnt = empirical_epsilon(-before, included, 1e-5)
    model = overfitted(base, [row for row, kept in zip(rows, included, strict=True) if kept], steps=150)
    found = empirical_epsilon(before - losses(model, rows), included, 1e-5)
    print(found, unlearnt)
    assert found.epsilon > 2.0 and unlearnt.epsilon < 0.5
