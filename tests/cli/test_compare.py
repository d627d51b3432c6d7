"""`fedlm compare` and `fedlm eval` on what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlm.cli.compare import costs_table, results_table
from fedlm.cli.main import app
from fedlm.recipe.load import dump_recipe
from fedlm.recipe.schema import Recipe
from tests.comparison.conftest import own_cache, recipe  # noqa: F401  (fixtures)


def fedlm(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def files(
    recipe: Recipe,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Any]:
    """The recipe's file, the comparison's directory, and what the command printed."""
    folder = tmp_path_factory.mktemp("cli")
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    return file, folder / "run", fedlm("compare", str(file), "--run-dir", str(folder / "run"), "--budgets", "steps")


def test_it_prints_the_table_the_verdict_and_the_places(files: tuple[Path, Path, Any]) -> None:
    _, folder, result = files
    outcome = json.loads((folder / "comparison.json").read_text())
    for words in ("alone (mean of 2)", "alone:silo-0001", "federated", "centralised", outcome["verdict"]["sentence"]):
        assert words in result.stdout
    assert (folder / "report.html").exists()
    assert "round 2/2" in result.stderr


def test_json_is_one_value_and_resuming_runs_nothing_again(files: tuple[Path, Path, Any]) -> None:
    file, folder, _ = files
    before = json.loads((folder / "comparison.json").read_text())
    result = fedlm("compare", str(file), "--run-dir", str(folder), "--budgets", "steps", "--resume", "--json")
    again = json.loads(result.stdout)
    assert again["arms"] == before["arms"]
    assert again["verdict"] == before["verdict"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--run-dir", "RUN"], "already holds a run"),
        (["--resume"], "--run-dir RUN --resume"),
        (["--run-dir", "NEW", "--resume"], "no comparison here"),
        (["--run-dir", "NEW", "--budgets", "step"], "did you mean 'steps'"),
        (["--run-dir", "NEW", "--seeds", "one"], "whole numbers"),
        (["--run-dir", "NEW", "--silos", "silo-1"], "no silo 'silo-1'"),
        (["--run-dir", "NEW", "--set", "training.lrr=1"], "lr"),
    ],
)
def test_mistakes_are_told_in_a_sentence(files: tuple[Path, Path, Any], arguments: list[str], words: str) -> None:
    file, folder, _ = files
    places = {"RUN": str(folder), "NEW": str(folder.with_name("new"))}
    result = fedlm("compare", str(file), *[places.get(a, a) for a in arguments], code=2)
    assert words in result.stderr


def test_eval_of_a_run_agrees_with_the_comparison(files: tuple[Path, Path, Any]) -> None:
    file, folder, _ = files
    arms = {a["arm"]: a for a in json.loads((folder / "comparison.json").read_text())["arms"]}
    last = json.loads(fedlm("eval", str(folder), "--round", "last", "--items", "--json").stdout)
    assert last["loss"] == arms["federated"]["metrics"]["loss"]
    assert last["accuracy"] == arms["federated"]["metrics"]["accuracy"]
    assert sum(len(silo["choice"]) for silo in last["items"].values()) == last["examples"]
    base = json.loads(fedlm("eval", str(file), "--base", "--json").stdout)
    assert base["loss"] == arms["base"]["metrics"]["loss"]
    assert "items" not in base
    validation = json.loads(fedlm("eval", str(folder), "--role", "validation", "--json").stdout)
    assert validation["examples"] != last["examples"]


def test_eval_prints_silos_intervals_and_fairness(files: tuple[Path, Path, Any]) -> None:
    text = fedlm("eval", str(files[1])).stdout
    for words in ("silo-0000", "all silos", "95 % interval", "accuracy over silos: mean"):
        assert words in text


def test_eval_measures_a_run_that_lets_no_figure_leave_where_its_rows_lie(files: tuple[Path, Path, Any]) -> None:
    """Whoever has the rows may know how good the model is on them, and is told that no budget covers it."""
    private = "privacy={unit: example, epsilon: 50, delta: 0.01}", "training.clip_norm=null", "guards=[{name: mask}]"
    private += ("federation.algorithm={name: fedavg, weights: equal}",)
    changes = [word for change in private for word in ("--set", change)]
    measured = fedlm("eval", str(files[1]), *changes)
    assert "outside its budget" in measured.stderr
    assert measured.stdout == fedlm("eval", str(files[1])).stdout


def test_eval_says_what_is_missing(files: tuple[Path, Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder, _ = files
    assert "add --base" in fedlm("eval", str(file), code=2).stderr
    assert "test or validation" in fedlm("eval", str(folder), "--role", "train", code=2).stderr
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert "fedlm[eval]" in fedlm("eval", str(folder), "--harness", "arc_easy", code=2).stderr


def test_many_silos_are_not_listed_one_by_one() -> None:
    cost = dict.fromkeys(("bytes_up", "bytes_down", "seconds", "peak_pss", "tokens_per_second", "steps", "tokens"), 1)
    row = {"kind": "alone", "accuracy": 0.5, "worst_accuracy": 0.4, **cost}
    rows = [{**row, "arm": "alone (mean of 40)", "of": None}]
    rows += [{**row, "arm": f"alone:{i}", "of": "alone"} for i in range(40)]
    assert results_table(rows).row_count == costs_table(rows).row_count == 1
    assert results_table(rows[:13]).row_count == 13
