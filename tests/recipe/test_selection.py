"""Selections of rows that a recipe may not ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.recipe.load import InvalidRecipeError, load_recipe

GOOD = """
name: demo
model: {source: models/tiny}
data:
  sources: [{path: rows.jsonl, columns: {prompt: p, response: r}}]
  partition: {kind: iid, silos: 4}
  selection: SELECTION
training: {steps: 2}
federation: {rounds: 4}
"""
HDS = "{method: fedhds, dimensions: 4, min_group: 3}"


@pytest.mark.parametrize(
    ("selection", "changes", "expected"),
    [
        ("{method: feddqc}", [], "data.selection: has no effect: set `keep`, `threshold` or `stages`"),
        ("{method: feddqc, stages: 5}", [], "5 stages do not fit into 4 rounds"),
        ("{method: feddqc, keep: 0.5, min_group: 3}", [], "min_group: has no effect with 'feddqc'"),
        ("{method: fedhds, keep: 0.5}", [], "keep: has no effect with 'fedhds' (it belongs to feddqc)"),
        ("{method: feddqc, keep: 0.0}", [], "data.selection.keep: must be greater than 0"),
        ("{method: random}", [], "unknown value 'random'"),
        (HDS, ["adapter.kind=full"], "not with full weights"),
        (
            HDS,
            ["task=pretrain", "data.sources=[{path: rows.jsonl, columns: {text: t}}]"],
            "rows are judged by instruction and response, which 'pretrain' rows have not",
        ),
    ],
)
def test_refused(tmp_path: Path, selection: str, changes: list[str], expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("SELECTION", selection))
    with pytest.raises(InvalidRecipeError) as caught:
        load_recipe(path, changes)
    assert expected in str(caught.value)


@pytest.mark.parametrize("selection", [HDS, "{method: feddqc, threshold: -0.5, stages: 4}"])
def test_accepted(tmp_path: Path, selection: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD.replace("SELECTION", selection))
    assert load_recipe(path).data.selection is not None
