"""Means of random groups: dealt by the run's seed, added up and never kept singly, and what f bad silos do to them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlm.algorithms import gathered, get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.gathered import Grouped, partition
from fedlm.errors import RunError
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AlgorithmSpec

from .bad_silos import ADAPTER, ATTACKS, F64, flat, honest, moved, step, theta, together

NAMES = [f"silo-{i:02}" for i in range(20)]
WEIGHTS = [1.0 + i % 3 for i in range(20)]
SEED = 5


def means(x: F64, groups: int, weights: list[float] | None = None, round_: int = 0) -> F64:
    weights = [1.0] * len(x) if weights is None else weights
    of = partition(NAMES[: len(x)], groups, SEED, round_)
    rows = [[i for i, name in enumerate(NAMES[: len(x)]) if of[name] == group] for group in range(groups)]
    return np.stack([np.average(x[row], axis=0, weights=[weights[i] for i in row]) for row in rows])


def test_groups_are_equal_keyed_and_new_in_every_round() -> None:
    first = partition(NAMES, 6, SEED, 0)
    assert first == partition(NAMES, 6, SEED, 0) and sorted(first) == NAMES
    assert sorted(Counter(first.values()).values()) == [3, 3, 3, 3, 4, 4]
    assert first != partition(NAMES, 6, SEED, 1) != partition(NAMES, 6, SEED + 1, 1)


def test_every_pair_is_together_as_often_as_any_other() -> None:
    """4 groups of 5: any two silos share one with probability 4/19."""
    together_ = np.zeros((20, 20))
    rounds = 500
    for round_ in range(rounds):
        of = np.array([partition(NAMES, 4, SEED, round_)[name] for name in NAMES])
        together_ += of[:, None] == of[None]
    shares = together_[np.triu_indices(20, 1)] / rounds
    assert abs(shares - 4 / 19).max() < 5 * (4 / 19 * 15 / 19 / rounds) ** 0.5


@pytest.mark.parametrize("name", [n for n, method in ALGORITHMS.items() if "groups" in method.options])
def test_a_rule_of_groups_is_the_rule_of_their_means(name: str, tmp_path: Path) -> None:
    sent = honest(20)
    weights = None if ALGORITHMS[name].equal_weights else WEIGHTS
    x = np.stack([flat(u) for u in sent])
    of = partition(NAMES, 7, SEED, 0)
    as_silos = [
        {
            n: sum(w * u[n] for u, w in zip(sent, weights or [1.0] * 20, strict=True) if u in members)
            / sum(w for u, w in zip(sent, weights or [1.0] * 20, strict=True) if u in members)
            for n in sent[0]
        }
        for members in _members(sent, of)
    ]
    heavy = (
        None
        if weights is None
        else [sum(w for w, n in zip(weights, NAMES, strict=True) if of[n] == g) for g in range(7)]
    )
    wanted = moved(as_silos, tmp_path, name=name, weights=heavy)
    found = moved(sent, tmp_path, name=name, groups=7, weights=weights)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(x).max())
    plain = moved(sent, tmp_path, name=name, weights=weights)
    assert np.linalg.norm(plain - found) > 1e-3 * np.linalg.norm(found), "another rule"


class _Members(list):
    """Membership by identity."""

    def __contains__(self, item: object) -> bool:
        return any(item is one for one in self)


def _members(sent: list, of: dict[str, int]) -> list[_Members]:
    return [_Members(u for name, u in zip(NAMES, sent, strict=True) if of[name] == group) for group in range(7)]


@pytest.mark.parametrize("held_bytes", [0, 10**9], ids=["on disk", "in memory"])
def test_no_update_is_kept_by_itself(held_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = honest(20)
    writes: list[int] = []
    monkeypatch.setattr(Grouped, "_write", lambda *_: writes.append(1))
    accumulator = Grouped(tmp_path, 4, held_bytes=held_bytes)
    accumulator.deal(NAMES, Place("", 0, 9, SEED))
    for name, update in zip(NAMES, sent, strict=True):
        accumulator.keep(update, 1.0, Place(name, 0, 9, SEED))
        assert not accumulator.kept and not accumulator.total
    assert not writes and accumulator.count == 20 and accumulator.weight == 20
    accumulator.complete()
    accumulator.complete()  # once is enough
    assert [kept.place.silo for kept in accumulator.kept] == [f"group-{i}" for i in range(4)]
    x = means(np.stack([flat(u) for u in sent]), 4)
    (d,) = flat(sent[0]).shape
    np.testing.assert_allclose(accumulator.block(0, d).double().numpy(), x, atol=1e-7)
    assert sorted(name for group in accumulator.figures["groups"].values() for name in group) == NAMES


def test_disk_and_memory_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = moved(honest(20), tmp_path, name="median", groups=5)
    monkeypatch.setattr(Grouped.__init__, "__kwdefaults__", {"held_bytes": 0})
    assert np.array_equal(one, moved(honest(20), tmp_path, name="median", groups=5))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gathered.os, "posix_fallocate", full)
    accumulator = Grouped(tmp_path, 4, held_bytes=0)
    accumulator.deal(NAMES, Place())
    with pytest.raises(RunError, match=r"no room on disk \(it is full\)"):
        accumulator.keep(honest(1)[0], 1.0, Place(NAMES[0]))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ["krum", "median", "rfa", "bulyan"])
def test_f_bad_silos_spoil_at_most_f_groups(name: str, attack: str, tmp_path: Path) -> None:
    """Whoever they share a group with: the step stays near the honest groups, which lie nearer together than silos."""
    bad, groups = 1 if name == "bulyan" else 2, 7
    good = honest(20 - bad)
    sent = [*good, *ATTACKS[attack](good, bad)]
    x = np.stack([flat(u) for u in good])
    reach = np.linalg.norm(x - x.mean(0), axis=1).max()
    for round_ in range(3):
        after, _, figures = step(sent, tmp_path, name=name, groups=groups, byzantine=bad, round_=round_)
        spoilt = sum(any(silo in NAMES[-bad:] for silo in members) for members in figures["groups"].values())
        assert 1 <= spoilt <= bad
        assert np.linalg.norm(flat(after) - flat(theta()) - x.mean(0)) < 2 * reach
    wide = np.linalg.norm(means(x[:18], 6) - x.mean(0), axis=1).max()
    assert wide < 0.8 * reach


def test_a_bad_silo_in_most_groups_takes_them_over(tmp_path: Path) -> None:
    good = honest(12)
    sent = [*good, *together(good, 8)]
    x = np.stack([flat(u) for u in good])
    spoilt = [len({partition(NAMES, 7, SEED, r)[n] for n in NAMES[12:]}) for r in range(9)]
    round_ = spoilt.index(max(spoilt))
    after, _, _ = step(sent, tmp_path, name="median", groups=7, byzantine=3, round_=round_)
    assert max(spoilt) >= 4
    apart = np.linalg.norm(flat(after) - flat(theta()) - x.mean(0))
    assert apart > 5 * np.linalg.norm(x - x.mean(0), axis=1).max()


def test_groups_without_an_answer_do_not_count(tmp_path: Path) -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="median", groups=5, byzantine=2), ADAPTER)
    of = partition(NAMES[:10], 5, SEED, 0)
    for silent in (1, 0):
        accumulator = algorithm.accumulator(tmp_path)
        algorithm.asked(accumulator, NAMES[:10], Place("", 0, 9, SEED))
        for name, update in zip(NAMES[:10], honest(10), strict=True):
            if of[name] >= silent:
                algorithm.fold(accumulator, update, 1.0, Place(name, 0, 9, SEED))
        if silent:
            with pytest.raises(RunError, match="at least 5, and 4 groups answered"):
                algorithm.server_step(theta(), accumulator, {}, Step(0, 10))
        else:
            algorithm.server_step(theta(), accumulator, {}, Step(0, 10))


def test_a_silo_that_was_not_dealt_a_group_is_an_error(tmp_path: Path) -> None:
    accumulator = Grouped(tmp_path, 2)
    accumulator.deal(["a", "b"], Place())
    with pytest.raises(RunError, match="'c' is in no group"):
        accumulator.keep({"w": torch.zeros(3)}, 1.0, Place("c"))
    accumulator.keep({"w": torch.zeros(3)}, 1.0, Place("a"))
    with pytest.raises(RunError, match="cannot be added up"):
        accumulator.keep({"w": torch.zeros(4)}, 1.0, Place("b"))
