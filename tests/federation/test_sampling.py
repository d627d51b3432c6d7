"""Sampling: keyed, canonical, uniform, and no work per silo that is not sampled."""

from __future__ import annotations

from collections import Counter

import pytest

from fedlm.federation.sampling import invited, quorum, sample, wanted
from fedlm.recipe.schema import FederationSpec

NAMES = [f"silo-{i:04d}" for i in range(20)]


def test_same_key_same_silos_and_every_round_its_own() -> None:
    assert sample(NAMES, 5, 0, "sample", 3) == sample(NAMES, 5, 0, "sample", 3)
    rounds = {tuple(sample(NAMES, 5, 0, "sample", r)) for r in range(20)}
    assert len(rounds) > 15
    assert sample(NAMES, 5, 1, "sample", 3) != sample(NAMES, 5, 0, "sample", 3)


def test_canonical_order_without_repeats() -> None:
    for round_ in range(50):
        chosen = sample(NAMES, 7, 0, "sample", round_)
        assert chosen == sorted(set(chosen)) and len(chosen) == 7


def test_every_silo_is_equally_likely() -> None:
    counts = Counter(name for r in range(4000) for name in sample(NAMES, 5, 0, "sample", r))
    # 1000 expected each, standard deviation 27.
    assert all(870 < counts[name] < 1130 for name in NAMES)


class Counting(list[str]):
    """A list that counts how often it is looked into."""

    looks = 0

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.looks += 1
        return super().__getitem__(index)

    def __iter__(self):  # type: ignore[no-untyped-def]
        raise AssertionError("went through all silos")


def test_work_grows_with_the_sample_only() -> None:
    silos = Counting(f"s{i:06d}" for i in range(100_000))
    assert len(sample(silos, 50, 0, "sample", 0)) == 50
    assert silos.looks == 50


@pytest.mark.parametrize(
    ("spec", "total", "want", "ask"),
    [
        (FederationSpec(), 7, 7, 7),
        (FederationSpec(sample=3), 7, 3, 3),
        (FederationSpec(sample=30), 7, 7, 7),
        (FederationSpec(sample=0.5), 7, 4, 4),
        (FederationSpec(sample=0.01), 7, 1, 1),
        (FederationSpec(sample=4, oversample=0.5), 20, 4, 6),
        (FederationSpec(sample=4, oversample=0.5), 5, 4, 5),
    ],
)
def test_counts(spec: FederationSpec, total: int, want: int, ask: int) -> None:
    assert (wanted(spec, total), invited(spec, total)) == (want, ask)


@pytest.mark.parametrize(("share", "sampled", "needed"), [(1.0, 5, 5), (0.6, 5, 3), (0.5, 5, 3), (0.01, 5, 1)])
def test_quorum_rounds_up(share: float, sampled: int, needed: int) -> None:
    assert quorum(FederationSpec(quorum=share), sampled) == needed
