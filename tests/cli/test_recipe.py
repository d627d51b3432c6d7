from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.recipe.load import load_recipe

run = CliRunner().invoke


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    run(app, ["init", "--out", str(path)])
    return path


def test_check_says_what_and_where(recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("  steps: 10", "  stepps: 10"))
    result = run(app, ["recipe", "check", str(recipe)])
    assert result.exit_code == 2
    assert "training.stepps: unknown field, did you mean 'steps'" in result.stderr


def test_check_json(recipe: Path) -> None:
    assert json.loads(run(app, ["recipe", "check", str(recipe), "--json"]).stdout)["ok"] is True
    result = run(app, ["recipe", "check", str(recipe), "--json", "--set", "training.lr=-1"])
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert answer["ok"] is False and "training.lr" in answer["problems"][0]


def test_check_mentions_files_that_are_not_here(recipe: Path) -> None:
    result = run(app, ["recipe", "check", str(recipe)])
    assert "Not on this machine: data/hospital-a.jsonl" in result.stderr
    (recipe.parent / "data").mkdir()
    (recipe.parent / "data" / "hospital-a.jsonl").write_text("{}")
    result = run(app, ["recipe", "check", str(recipe)])
    assert "hospital-a" not in result.stderr and "hospital-b" in result.stderr


def test_show_is_a_recipe(recipe: Path) -> None:
    shown = run(app, ["recipe", "show", str(recipe), "--set", "seed=7"]).stdout
    other = recipe.with_name("shown.yaml")
    other.write_text(shown)
    assert load_recipe(other) == load_recipe(recipe, ["seed=7"])
    assert json.loads(run(app, ["recipe", "show", str(recipe), "--json"]).stdout)["seed"] == 0


def test_schema_knows_the_fields() -> None:
    schema = json.loads(run(app, ["recipe", "schema"]).stdout)
    assert schema["additionalProperties"] is False
    assert {"model", "data", "training"} <= set(schema["required"])


def test_reference(tmp_path: Path) -> None:
    path = tmp_path / "reference.md"
    assert run(app, ["recipe", "reference", "--out", str(path)]).exit_code == 0
    assert "`micro_batch_size`" in path.read_text()


def test_reference_that_cannot_be_written(tmp_path: Path) -> None:
    for out in (tmp_path / "nope" / "x.md", tmp_path):
        result = run(app, ["recipe", "reference", "--out", str(out)])
        assert result.exit_code == 2
        assert str(out) in result.stderr and "Fix: correct the path" in result.stderr


def test_check_of_paths_that_no_machine_knows(recipe: Path) -> None:
    for path in ("~nouser/x.jsonl", "x" * 300):
        changes = ["--set", f"data.silos.0.sources.0.path={path}"]
        result = run(app, ["recipe", "check", str(recipe), *changes])
        assert result.exit_code == 0
        assert f"Not on this machine: {path}" in result.stderr
    result = run(app, ["recipe", "check", str(recipe), "--set", "data.silos.0.sources.0.path=d/**x.jsonl"])
    assert result.exit_code == 2
    assert "'**' must be a part of its own" in result.stderr
