"""Making instructions of text: what a recipe may not ask for."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.recipe.load import InvalidRecipeError, load_recipe

GOOD = """
name: demo
model: {source: models/tiny}
data:
  sources: [{path: rows.jsonl, columns: {text: t}}]
  partition: {kind: iid, silos: 4}
  instructions: {shots: 1, pool: [{text: a text, instruction: what is it, response: a text}]}
training: {steps: 2}
evaluation: {metrics: [loss, rouge]}
"""


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.instructions.shots=2"], "data.instructions.shots: the pool holds 1 example(s)"),
        (["data.instructions.pool=[]"], "data.instructions.pool"),
        (["adapter.kind=full"], "not with full weights"),
        (["task=pretrain", "evaluation.metrics=[loss]"], "has no effect on task 'pretrain'"),
        (
            ["data.sources=[{path: rows.jsonl, columns: {prompt: p, response: r}}]"],
            "instructions are made of text rows, and these are messages already",
        ),
        (["data.instructions=null"], "task 'instruct' cannot learn from text rows"),
    ],
)
def test_refused(tmp_path: Path, changes: list[str], expected: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    assert load_recipe(path).data.instructions is not None
    with pytest.raises(InvalidRecipeError) as caught:
        load_recipe(path, changes)
    assert expected in str(caught.value)
