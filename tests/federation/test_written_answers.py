"""Metrics of written answers through a whole run: figures in the records, counts that no honest silo sends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import UpdateRefused
from fedlm.federation.api import run_recipe
from fedlm.federation.figures import check_counts
from fedlm.messages import Reply
from tests.federation.conftest import Tiny

CHANGES = ("federation.rounds=1", "evaluation.metrics=[loss, rouge, exact_match, f1]", "evaluation.max_new_tokens=4")


def test_a_run_measures_what_the_model_writes(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(*CHANGES, "federation.workers=2")
    result = run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert result.evaluation is not None
    for measured in (json.loads((tmp_path / "run/rounds.jsonl").read_text().splitlines()[-1])["validation"],):
        assert {"rouge1", "rouge2", "rougeL", "f1", "exact_match", "exact_match_interval"} <= measured.keys()
        assert measured["f1_total"] == measured["examples"] and 0 <= measured["f1"] <= 1
    alone = run_recipe(tiny.recipe(*CHANGES), base=tiny.base, run_dir=tmp_path / "again")
    assert alone.evaluation is not None
    for name in ("rouge1", "rouge2", "rougeL", "f1", "exact_match"):  # the number of workers changes no bit
        assert alone.evaluation["final"][name] == result.evaluation["final"][name]


@pytest.mark.parametrize(
    ("name", "pair", "why"),
    [
        ("f1", [9.0, 8], "9.0 of 8"),
        ("f1", [-1.0, 8], "-1.0 of 8"),
        ("rougeL", [3.0, 11], "counts 11, above 10"),
        ("exact_match", None, "no sum and count"),
        ("rouge2", [float("nan"), 8], "rouge2"),
    ],
)
def test_counts_that_no_honest_silo_sends(tiny: Tiny, name: str, pair: Any, why: str) -> None:
    figures = {figure: [1.0, 8] for figure in ("f1", "exact_match", "rouge1", "rouge2", "rougeL")}
    fields = {"examples": 10, "loss_sum": 1.0, "loss_tokens": 9, "figures": figures}
    recipe = tiny.recipe(*CHANGES)
    check_counts(Reply("a", "evaluate", "run", 0, fields=fields), recipe, 10)
    if pair is None:
        del figures[name]
    else:
        figures[name] = pair
    with pytest.raises(UpdateRefused, match=why):
        check_counts(Reply("a", "evaluate", "run", 0, fields=fields), recipe, 10)
