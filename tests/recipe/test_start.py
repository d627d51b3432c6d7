"""`from: RUN` in a recipe: what it inherits, what is explicit afterwards, what is refused and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import RecipeError
from fedlm.recipe.load import InvalidRecipeError, dump_recipe, load_recipe
from fedlm.recipe.model import AdapterSpec
from fedlm.recipe.start import unlike, usual_way

FIRST = """
name: first
model: {source: smollm2-135m-instruct, dtype: float32, chat_template: chatml}
adapter: {rank: 4, alpha: 8}
data:
  sources: [{path: rows.jsonl, columns: {prompt: q, response: a}}]
  partition: {kind: natural, by: site}
training: {steps: 1}
"""
SECOND = """# the next stage
name: second
from: runs/first
data:
  sources: [{path: rows.jsonl, columns: {prompt: q, response: a}}]
  partition: {kind: natural, by: site}
training: {steps: 1}
"""


def finished(folder: Path, text: str = FIRST, **meta: Any) -> Path:
    """The directory of a run as far as a recipe looks at it."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(text)
    (folder / "run.json").write_text(json.dumps({"status": "finished", "rounds_done": 4, **meta}))
    return folder


@pytest.fixture
def second(tmp_path: Path) -> Path:
    finished(tmp_path / "runs" / "first")
    (tmp_path / "second.yaml").write_text(SECOND)
    return tmp_path / "second.yaml"


def test_model_and_adapter_are_inherited_and_written_out(second: Path) -> None:
    recipe, old = load_recipe(second), load_recipe(second.parent / "runs" / "first" / "recipe.yaml")
    assert recipe.model == old.model and recipe.adapter == old.adapter
    assert recipe.start is not None and recipe.start.adapter == "continue"
    assert recipe.start.run == str(second.parent / "runs" / "first")
    written = second.parent / "resolved.yaml"
    written.write_text(dump_recipe(recipe))
    shutil.rmtree(second.parent / "runs")  # what is resolved needs the old run no more
    assert load_recipe(written) == recipe


def test_what_is_given_stays(second: Path) -> None:
    recipe = load_recipe(second, ["model.dtype=bfloat16", "adapter.rank=2"])
    assert recipe.model.dtype == "bfloat16" and recipe.model.chat_template == "chatml"
    assert recipe.adapter.rank == 2 and recipe.adapter.alpha == 16.0  # an adapter is inherited whole or not at all
    assert recipe.start is not None and recipe.start.adapter == "stack"


def test_from_can_be_set_and_is_short_for_start(second: Path) -> None:
    finished(second.parent / "other", FIRST.replace("rank: 4", "rank: 2"))
    assert load_recipe(second, ["from=other"]).adapter.rank == 2
    second.write_text(SECOND.replace("from: runs/first", "start: {run: runs/first, adapter: stack}"))
    recipe = load_recipe(second)
    assert recipe.start is not None and recipe.start.adapter == "stack"


def test_a_run_with_full_weights_becomes_the_base(second: Path) -> None:
    folder = second.parent / "runs" / "first"
    (folder / "recipe.yaml").write_text(
        FIRST.replace("{rank: 4, alpha: 8}", "{kind: full}").replace("float32", "bfloat16")
    )
    same, lora = load_recipe(second), load_recipe(second, ["adapter.rank=2"])
    assert same.model.source == lora.model.source == str(folder / "adapter")
    assert same.adapter.kind == "full" and same.model.dtype == "float32", "full weights go on unrounded"
    assert lora.model.dtype == "bfloat16" and lora.model.chat_template is None
    assert same.start is not None and lora.start is not None
    assert (same.start.adapter, lora.start.adapter) == ("continue", "stack")
    with pytest.raises(InvalidRecipeError, match=r"model\.dtype: full weights go on .* set it to float32"):
        load_recipe(second, ["model.dtype=bfloat16"])


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"status": "interrupted", "rounds_done": 2}, r"second.yaml:3: .*no final model.*'interrupted' after 2 rounds"),
        ({"status": "running", "rounds_done": 0}, r"finish it first: fedlm run --resume"),
    ],
)
def test_an_unfinished_run_is_refused(second: Path, meta: dict[str, Any], said: str) -> None:
    (second.parent / "runs" / "first" / "run.json").write_text(json.dumps(meta))
    with pytest.raises(RecipeError, match=said):
        load_recipe(second)


def test_no_run_a_damaged_one_and_one_without_an_adapter_are_refused(second: Path) -> None:
    run = second.parent / "runs" / "first"
    with pytest.raises(RecipeError, match=r"--set from: there is no run in '.*nowhere' to start from"):
        load_recipe(second, ["from=nowhere"])
    (run / "adapter").rmdir()
    with pytest.raises(RecipeError, match="its folder 'adapter' is missing"):
        load_recipe(second)
    (run / "run.json").write_text("{")
    with pytest.raises(RecipeError, match=r"run\.json is damaged"):
        load_recipe(second)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("from: runs/first", "from: runs/first\nstart: {run: runs/first}", "from: unknown field"),
        ("from: runs/first", "from: [1]", r"second.yaml:3: start.run: must be a valid string"),
        ("from: runs/first", "start: {run: runs/first, adapter: merge}", "unknown value 'merge'"),
        (
            "from: runs/first",
            "start: {run: runs/first, adapter: continue}\nfederation: {algorithm: {name: flora}}",
            "second.yaml:3: start.adapter: 'flora' cannot continue an adapter: every round begins with a fresh one",
        ),
        (
            "from: runs/first",
            "start: {run: runs/first, adapter: stack}\nadapter: {kind: full}\nmodel: {source: x, dtype: float32}",
            "full weights lie below nothing",
        ),
    ],
)
def test_what_cannot_be_says_where(second: Path, old: str, new: str, said: str) -> None:
    second.write_text(SECOND.replace(old, new))
    with pytest.raises(RecipeError, match=said):
        load_recipe(second)


def test_the_usual_way() -> None:
    lora, wide, full = AdapterSpec(), AdapterSpec(rank=16), AdapterSpec(kind="full")
    assert usual_way(lora, lora, "fedavg") == "continue"
    assert usual_way(lora, wide, "fedavg") == usual_way(lora, lora, "flora") == "stack"
    assert usual_way(full, full, "fedavg") == "continue" and usual_way(full, lora, "fedavg") == "stack"
    named = AdapterSpec(targets=["q_proj", "v_proj"]), AdapterSpec(targets=["v_proj", "q_proj"])
    assert unlike(*named) is None and "adapter.targets" in str(unlike(lora, named[0]))
