"""`fedlm prompt search` and `fedlm prompt icl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app

COLUMNS = "{question: question, choices: choices, answer: answer}"


def fedlm(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"money lent {n}?", "choices": ["bank", "school"], "answer": n % 2, "site": f"s{n % 2}"}
        for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: text\nmodel: {{source: {tiny_model_dir}, dtype: float32}}\n"
        f"data:\n  sources: [{{path: rows.jsonl, columns: {COLUMNS}}}]\n  partition: {{kind: natural, by: site}}\n"
        "  split: {validation: 0.2, test: 0.2}\ntraining: {steps: 1, max_length: 64}\n"
        "federation: {rounds: 1, workers: 1}\n"
    )
    return file


SEARCH = ("--set", "search={candidates: [the bank, the school], rows: 8}")
ICL = ("--set", f"in_context={{queries: {{path: rows.jsonl, columns: {COLUMNS}, max_rows: 3}}, examples: 1}}")


def test_search(recipe: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    told = fedlm("prompt", "search", str(recipe), *SEARCH, "--run-dir", run)
    assert "this prompt: accuracy" in told.stdout and "round 1/1: accuracy" in told.stderr
    assert (tmp_path / "run" / "prompt.txt").exists()
    value = json.loads(fedlm("prompt", "search", str(recipe), *SEARCH, "--run-dir", run, "--resume", "--json").stdout)
    assert value["prompt"] in ("", "the bank", "the school") and set(value["test"]) == {"none", "first", "best"}
    assert "so it has no report" in fedlm("report", run, code=2).stderr
    assert "already holds a run" in fedlm("prompt", "search", str(recipe), *SEARCH, "--run-dir", run, code=2).stderr


def test_icl(recipe: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    told = fedlm("prompt", "icl", str(recipe), *ICL, "--run-dir", run)
    assert "on 3 questions after 1 round(s)" in told.stdout and "mean of 2" in told.stdout
    value = json.loads(fedlm("prompt", "icl", str(recipe), *ICL, "--run-dir", run, "--force", "--json").stdout)
    assert value["questions"] == 3 and set(value["accuracy"]["silos"]) == {"s0", "s1"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prompt", "search"), "searches no prompt"),
        (("prompt", "icl"), "asks no questions"),
        (("prompt", "search", *SEARCH, "--silo", "s7"), "there is no silo 's7'"),
        (("prompt", "search", *SEARCH, "--resume"), "resuming needs the run directory"),
        (("run", *SEARCH), "trains nothing"),
    ],
)
def test_mistakes_are_told_in_a_sentence(recipe: Path, arguments: tuple[str, ...], words: str) -> None:
    split = 1 if arguments[0] == "run" else 2
    result = fedlm(*arguments[:split], str(recipe), *arguments[split:], code=2)
    assert words in result.stderr and "Traceback" not in result.output
