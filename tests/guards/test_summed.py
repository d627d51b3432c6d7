"""Figures under a mask: the sum over silos is exact, and what has no place in it is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import fedlm.guards.summed
from fedlm.errors import RunError, UpdateRefused
from fedlm.guards.summed import COUNTS, figures_length, figures_ring, hidden_figures, shown_figures
from fedlm.messages import Fields
from fedlm.privacy.secagg.message import Words
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.recipe.starters import read_template


@pytest.fixture
def recipe(tmp_path: Any) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(read_template("news"))
    return load_recipe(file)


def summed(recipe: Recipe, parts: list[Fields]) -> Words:
    ring = 2 ** figures_ring(len(parts)) - 1
    words = [hidden_figures(part, recipe) for part in parts]
    assert all(w.dtype == np.uint32 and w.shape == (figures_length(recipe),) and int(w.max()) <= ring for w in words)
    return (sum(w.astype(np.uint64) for w in words) & np.uint64(ring)).astype(np.uint32)


@pytest.mark.parametrize("silos", [3, 4, 1000])
def test_the_sum_is_exact(recipe: Recipe, silos: int) -> None:
    draw = np.random.default_rng(silos)
    parts: list[Fields] = [
        {
            **{name: int(draw.integers(0, 2**40)) for name in COUNTS},
            "loss_sum": float(draw.exponential(1e6)),
            "figures": {"reward_margin": [float(draw.normal(0, 1e5)), 7], "f1": [0.25, 1]},
        }
        for _ in range(silos)
    ]
    found = shown_figures(summed(recipe, parts), recipe)
    for name in COUNTS:
        assert found[name] == sum(part[name] for part in parts) and type(found[name]) is int
    assert found["loss_sum"] == pytest.approx(math.fsum(p["loss_sum"] for p in parts), abs=silos * 2**-25)
    margin, count = found["figures"]["reward_margin"]
    assert margin == pytest.approx(math.fsum(p["figures"]["reward_margin"][0] for p in parts), abs=silos * 2**-25)
    assert count == 7 * silos and found["figures"]["f1"] == (0.25 * silos, silos)
    assert found["figures"]["rougeL"] == (0, 0)  # that nobody counted


def test_the_largest_and_smallest_numbers_of_the_most_silos_fit(recipe: Recipe) -> None:
    """65536 times the largest magnitude, either sign, without adding up so many vectors."""
    silos, most = 2**16, 2.0**53 - 1
    for sign in (1, -1):
        words = hidden_figures({"figures": {"reward": [sign * most, 1]}}, recipe).astype(np.uint64) * silos
        assert int(words.max()) < 2 ** figures_ring(silos)
        assert shown_figures(words.astype(np.uint32), recipe)["figures"]["reward"] == (sign * most * silos, silos)
    with pytest.raises(RunError, match="take 33 bits"):
        figures_ring(silos + 1)


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ({"loss_sum": math.nan}, "the figure 'loss_sum' is nan"),
        ({"loss_sum": math.inf}, "the figure 'loss_sum' is inf"),
        ({"examples": 2**53}, "the figure 'examples' is 9007199254740992"),
        ({"examples": True}, "the figure 'examples' is True"),
        ({"figures": {"f2": [1, 1]}}, "the figure 'f2' has no place"),
        ({"figures": {"label_f1/2": [1, 1]}}, "the figure 'label_f1/2' has no place"),
    ],
)
def test_what_cannot_be_added_up_is_refused(
    recipe: Recipe, measured: Fields, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fedlm.guards.summed, "labels_of", lambda _: ["yes", "no"])
    with pytest.raises(UpdateRefused, match=words):
        hidden_figures(measured, recipe)
    assert hidden_figures({"figures": {"label_f1/1": [1, 1]}}, recipe).any()


def test_parts_of_a_row_are_no_count(recipe: Recipe) -> None:
    total = summed(recipe, [{"examples": 1}, {"examples": 0.5}, {}])
    with pytest.raises(RunError, match="a count is no whole number"):
        shown_figures(total, recipe)
