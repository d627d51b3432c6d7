"""Preference alignment in a recipe: every setting that cannot be kept or has no effect is refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import RecipeError
from fedlm.recipe.load import load_recipe
from fedlm.recipe.preference import LOSSES
from fedlm.recipe.schema import Recipe

GOOD = """\
name: aligned
task: preference
model: {source: models/tiny}
data:
  sources: [{path: rows.jsonl, columns: {prompt: prompt, chosen: chosen, rejected: rejected, label: aim}}]
  partition: {kind: iid, silos: 2}
training: {steps: 5}
"""
COLUMNS = "data.sources=[{{path: rows.jsonl, columns: {{{}}}}}]"
JUDGED = COLUMNS.format("prompt: p, response: r, desirable: good")


@pytest.fixture
def load(tmp_path: Path) -> Any:
    (tmp_path / "recipe.yaml").write_text(GOOD)

    def _load(*changes: str) -> Recipe:
        return load_recipe(tmp_path / "recipe.yaml", changes)

    return _load


@pytest.mark.parametrize(
    "changes",
    [
        ["preference={loss: dpo, label_smoothing: 0.1}"],
        ["preference={loss: simpo, gamma: 1.0}", "adapter.kind=full"],
        ["preference={loss: orpo}", "adapter.kind=full"],
        [JUDGED, "preference={loss: kto, undesirable_weight: 2.0}"],
        [COLUMNS.format("messages: m, chosen: c, rejected: r")],
        [COLUMNS.format("question: q, choices: o, answer: a")],
        ["preference={weights: {helpful: 0.7, harmless: 0.3}, silo_weights: {silo-0: {helpful: 1.0, harmless: 1.0}}}"],
    ],
)
def test_possible(changes: list[str], load: Any) -> None:
    load(*changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["preference={loss: simpo, label_smoothing: 0.1}"], "no effect with 'simpo' (it belongs to dpo)"),
        (["preference={loss: dpo, gamma: 1.0}"], "no effect with 'dpo' (it belongs to simpo)"),
        (["preference={loss: ipo, desirable_weight: 2.0}"], "no effect with 'ipo' (it belongs to kto)"),
        (["preference.loss=dop"], "dpo"),
        (["preference.beta=0"], "greater than 0"),
        (["adapter.dropout=0.1"], "would make random"),
        (["adapter.kind=full"], "use a loss without a reference (orpo, simpo)"),
        ([JUDGED], "'dpo' needs pairs of answers; single ones are for kto"),
        ([COLUMNS.format("text: t")], "task 'preference' cannot learn from text rows"),
        ([COLUMNS.format("messages: m, chosen: c")], "map rows in exactly one way"),
        (["evaluation.metrics=[loss, choice]"], "'choice' is no figure of the task 'preference'"),
        ([COLUMNS.format("prompt: p, chosen: c, rejected: r"), "preference.weights={a: 1.0}"], "row's objective"),
        (["preference.silo_weights={silo-0: {a: 1.0}}"], "must weigh the same objectives"),
        (["federation.capacity={default: {memory: 2GB}}"], "memory is planned for examples of one sequence"),
        (
            ["task=instruct", COLUMNS.format("prompt: p, response: r"), "preference.loss=kto"],
            "no effect with task 'instruct'",
        ),
    ],
)
def test_impossible(changes: list[str], reason: str, load: Any) -> None:
    with pytest.raises(RecipeError) as caught:
        load(*changes)
    assert reason in str(caught.value)


def test_the_strength_is_the_losss_own_default(load: Any) -> None:
    found = {loss: load(f"preference.loss={loss}").preference.strength for loss in LOSSES}
    assert found == {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
    assert load("preference={loss: simpo, beta: 0.5}").preference.strength == 0.5
