"""`fedlm tokenizer train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app


def fedlm(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"the bank lent money to school {n}", "site": f"s{n % 2}"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "name: words\ntask: pretrain\nmodel: {source: 'preset:llama-1m', tokenizer: ./words}\nadapter: {kind: full}\n"
        "data:\n  sources: [{path: rows.jsonl, columns: {text: text}}]\n  partition: {kind: natural, by: site}\n"
        "training: {steps: 1}\n"
    )
    return file


def test_a_folder_figures_and_what_to_write_into_a_recipe(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "words"
    result = fedlm("tokenizer", "train", str(recipe), "--out", str(out), "--vocabulary", "270")
    assert "270 tokens from 12 merges over 2 silos" in result.stdout
    assert "MB up" in result.stdout and f"tokenizer: {out}" in result.stdout
    assert (out / "tokenizer.json").is_file() and (out / "tokenizer_config.json").is_file()
    assert "is a valid recipe" in fedlm("recipe", "check", str(recipe)).stdout


def test_json_and_one_silo_and_fewer_merges_than_asked_for(recipe: Path, tmp_path: Path) -> None:
    words = ("tokenizer", "train", str(recipe), "--silo", "s0", "--vocabulary", "2000", "--chat-template", "chatml")
    value = json.loads(fedlm(*words, "--out", str(tmp_path / "a"), "--json").stdout)
    assert value["silos"] == ["s0"] and 260 < value["tokens"] == 260 + value["merges"] < 400
    assert value["bytes_up"] > 4 * 256 * 256
    assert "no other pair occurs 2 times" in fedlm(*words, "--out", str(tmp_path / "b")).stderr


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--vocabulary", "100"], "is not between 259"),
        (["--silo", "s7"], "there is no silo 's7'"),
        (["--set", "training.stepz=1"], "did you mean 'steps'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(recipe: Path, tmp_path: Path, more: list[str], words: str) -> None:
    result = fedlm("tokenizer", "train", str(recipe), "--out", str(tmp_path / "words"), *more, code=2)
    assert words in result.stderr and "Traceback" not in result.output
