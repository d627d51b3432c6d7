"""`fedlm bench`: the table on the screen and in files, and what mistakes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.recipe.load import dump_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import Recipe
from tests.comparison.conftest import own_cache, recipe  # noqa: F401  (fixtures)


def fedlm(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    path = tmp_path_factory.mktemp("cli-bench") / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


def test_it_prints_the_table_writes_the_files_and_goes_on(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = ["algorithms", str(file), "--methods", "fedit,ffa-lora", "--lrs", "1", "--seeds", "1", "--out", str(out)]
    result = fedlm(*asked, "--workers", "2", "--bytes", "1kB,10MB")
    for words in ("ffa-lora", "test loss", "aggregation error", "FFA-LoRA aggregates exactly", str(out / "bench.html")):
        assert words in result.stdout
    assert "4/4" in result.stderr and "test loss" in result.stderr
    stored = json.loads((out / "bench.json").read_text())
    assert stored["budgets"] == [1000.0, 10_000_000.0] and {"bench.md", "bench.csv"} <= {p.name for p in out.iterdir()}
    again = json.loads(fedlm(*asked, "--resume", "--json", "--bytes", "1kB,10MB").stdout)
    assert again["rows"] == stored["rows"]


def test_a_row_without_a_result_is_an_error_after_the_others_are_done(file: Path, tmp_path: Path) -> None:
    asked = ["algorithms", str(file), "--groups", "zeroth", "--methods", "fedmezo", "--lrs", "1", "--seeds", "1"]
    result = fedlm(*asked, "--set", "training.max_length=4096", "--out", str(tmp_path / "out"), code=2)
    assert "1 of 1 rows have no result: fedmezo" in result.stderr and "256 positions" in result.stderr
    assert "fedmezo" in (tmp_path / "out" / "bench.md").read_text()


def test_rows_are_listed() -> None:
    rows = json.loads(fedlm("rows", "--json").stdout)
    assert {row["method"] for row in rows} == set(ALGORITHMS)
    assert "Zhang et al." in fedlm("rows").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "fedti"], "did you mean 'fedit'"),
        (["--groups", "optimizer"], "did you mean 'optimiser'"),
        (["--seeds", "a"], "whole numbers"),
        (["--seeds", "0,1"], "seed 0 would both"),
        (["--bytes", "1XB"], "no number of bytes"),
        (["--resume"], "name it: --out DIR"),
        (["--set", "training.lrr=1"], "lr"),
        (["--methods", "rolora", "--set", "federation.rounds=1"], "at least 2 rounds"),
    ],
)
def test_mistakes_are_told_in_a_sentence(file: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    place = [] if "--resume" in arguments else ["--out", str(tmp_path / "out")]
    assert words in fedlm("algorithms", str(file), *arguments, *place, code=2).stderr
