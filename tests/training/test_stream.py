"""The order of examples over a whole run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedlm.recipe.schema import TrainingSpec
from fedlm.training.batches import batches, steps_per_round

KEY = (0, "silo-0000")


def spec(**changes: Any) -> TrainingSpec:
    return TrainingSpec(**{"steps": 4, "batch_size": 6, "order": "stream", **changes})


def seen(s: TrainingSpec, n: int, round_: int, key: tuple[str | int, ...] = KEY) -> np.ndarray[Any, Any]:
    return np.concatenate(list(batches(s, np.arange(1, n + 1), key, round_)))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    ("n", "changes"),
    [(23, {}), (24, {}), (5, {}), (100, {}), (41, {"steps": None, "epochs": 0.3}), (7, {"steps": None, "epochs": 2.5})],
)
def test_over_all_rounds_every_sequence_is_seen_before_any_is_seen_twice_more(
    n: int, changes: dict[str, Any], packing: bool
) -> None:
    s = spec(packing=packing, **changes)
    rounds = [seen(s, n, round_) for round_ in range(9)]
    for done in range(1, 10):
        counts = np.bincount(np.concatenate(rounds[:done]), minlength=n)
        assert np.ptp(counts) <= 1
    assert all(len(list(batches(s, np.ones(n, int), KEY, r))) == steps_per_round(s, n) for r in range(9))


def test_it_does_not_matter_into_how_many_rounds_the_steps_are_cut() -> None:
    """Six rounds of four steps go through the very batches of one round of 24, epochs' ends included."""
    whole = list(batches(spec(steps=24), np.ones(23, int), KEY, 0))
    cut = [b for r in range(6) for b in batches(spec(), np.ones(23, int), KEY, r)]
    assert len(whole) == len(cut) and all((a == b).all() for a, b in zip(whole, cut, strict=True))


def test_a_round_s_place_depends_on_its_number_alone_and_silos_differ() -> None:
    assert (seen(spec(), 23, 5) == seen(spec(), 23, 5)).all()
    assert not (seen(spec(), 23, 5) == seen(spec(), 23, 5, (0, "silo-0001"))).all()
    assert not (seen(spec(), 24, 0) == seen(spec(), 24, 1)).all()  # each epoch has an order of its own
    rounds = [seen(spec(order="rounds"), 60, r) for r in range(9)]
    assert np.ptp(np.bincount(np.concatenate(rounds), minlength=60)) > 1  # what the other order does not promise
