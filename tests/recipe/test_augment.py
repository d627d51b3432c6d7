"""Public rows that a recipe may not ask for."""

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
  augment:
    sources: [{path: public.jsonl, columns: {prompt: q, response: a}}]
    rows: 8
training: {steps: 2}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    return file


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["data.augment.rows=0"], "data.augment.rows: must be greater than 0"),
        (["data.augment.sources=[]"], "data.augment.sources"),
        (["data.augment.min_group=1"], "data.augment.min_group: must be greater than or equal to 2"),
        (["data.augment.centres=9"], "9 centres cannot be chosen of 8 clusters"),
        (["data.augment.centres=5", "data.augment.rows=4"], "4 rows cannot be shared out among 5 centres"),
        (["data.augment.sources.0.role=test"], "data.augment.sources.0.role: public rows are trained on"),
        (["data.augment.sources.0.columns={text: t}"], "all sources must map to one kind of example"),
        (["data.augment.sources.0.path=hub:a/b"], "data.augment.sources.0.revision: a hub source must be pinned"),
        (["adapter.kind=full"], "not with full weights"),
        (["data.selection={method: fedhds}"], "not together with data.selection"),
        (
            ["task=pretrain", "data.sources.0.columns={text: t}", "data.augment.sources.0.columns={text: t}"],
            "public rows are found by instruction and response, which 'pretrain' rows have not",
        ),
    ],
)
def test_impossible(path: Path, changes: list[str], expected: str) -> None:
    with pytest.raises(InvalidRecipeError) as refused:
        load_recipe(path, changes)
    assert expected in str(refused.value)


def test_possible(path: Path) -> None:
    spec = load_recipe(path).data.augment
    assert spec is not None and (spec.centres, spec.clusters, spec.min_group, spec.dimensions) == (1, 8, 5, 32)
