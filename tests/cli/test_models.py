"""`fedlm models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.models.catalogue import CATALOGUE


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))


def fedlm(*arguments: str, code: int = 0, **more: object) -> object:
    result = CliRunner().invoke(app, list(arguments), **more)
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_list_says_source_size_licence_and_state() -> None:
    text = fedlm("models").stdout
    for model in CATALOGUE.values():
        assert {model.name, model.source, model.sha256, model.licence} <= set(text.replace(",", " ").split())
    listed = json.loads(fedlm("models", "--json").stdout)
    (row,) = listed["models"]
    assert row["name"] == "smollm2-135m-instruct"
    assert row["cached"] is False
    (small,) = [size for size in listed["presets"] if size["source"] == "preset:llama-1m"]
    assert small["parameters"]["2048"] == 1_053_824
    assert "preset:llama-1b" in text


def test_fetching_converts_into_the_cache(tiny_model_dir: Path, tmp_path: Path) -> None:
    for _ in range(2):
        result = fedlm("models", "fetch", str(tiny_model_dir), "--json")
        report = json.loads(result.stdout)
    assert Path(report["folder"]).parent == tmp_path / "cache" / "models"
    assert report["bytes"] > 100_000
    assert "is ready" in fedlm("models", "fetch", str(tiny_model_dir), "--dtype", "float32").stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smollm2-135m"], "did you mean 'smollm2-135m-instruct'"),
        (["{tiny}", "--sha256", "0" * 64], "was asked for"),
        (["{tiny}", "--dtype", "float8"], "dtype: Input should be 'float32' or 'bfloat16'"),
        (["hub:a/b", "--revision", "main"], "40 hex digits"),
    ],
)
def test_bad_input_is_one_sentence(tiny_model_dir: Path, arguments: list[str], words: str) -> None:
    given = [a.replace("{tiny}", str(tiny_model_dir)) for a in arguments]
    result = fedlm("models", "fetch", *given, code=2)
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_the_catalogues_models_are_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDLM_CACHE")
    fedlm("models", "fetch", "smollm2-135m-instruct")
    assert json.loads(fedlm("models", "--json").stdout)["models"][0]["cached"] is True
