"""Every template is a valid recipe, and the generated reference is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.errors import RecipeError
from fedlm.recipe.load import dump_recipe, load_recipe
from fedlm.recipe.pipeline import load_pipeline
from fedlm.recipe.reference import write_reference
from fedlm.recipe.starters import DEFAULT, pipelines, read_template, templates

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", templates())
def test_template_is_valid(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(read_template(name))
    recipe = load_recipe(path)
    assert recipe.name == name
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize("name", pipelines())
def test_pipeline_is_valid(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.yaml"
    path.write_text(read_template(name))
    stages = load_pipeline(path, tmp_path / "run").stages
    assert [stage.recipe.task for stage in stages] == ["pretrain", "instruct", "preference"]
    again = tmp_path / "again.yaml"
    for stage in stages:  # resolved, it needs no run to be read again
        again.write_text(dump_recipe(stage.recipe))
        assert load_recipe(again) == stage.recipe


def test_the_promised_templates_exist() -> None:
    promised = {
        "news",
        "education",
        "health",
        "health-qa",
        "finance",
        "pretrain",
        "qa",
        "summarise",
        "dialogue",
        "preference",
        "from-text",
        "pretrain-scratch",
        "fdapt",
        "prompt-search",
        "in-context",
        "prompt",
        "fedbpt",
        "groups",
    }
    promised |= {"classify", "realign", "reward", "private"}
    assert promised | {DEFAULT} <= set(templates())
    assert all(about.endswith((".", "?", "!")) and len(about) < 120 for about in templates().values())


@pytest.mark.parametrize("name", ["nwes", "../schema", "news.yaml"])
def test_unknown_template(name: str) -> None:
    with pytest.raises(RecipeError, match="there is no template"):
        read_template(name)


def test_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8")
    assert written == write_reference(), "run `make docs` (or: fedlm recipe reference --out docs/recipe-reference.md)"
