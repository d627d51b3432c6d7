from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli import doctor
from fedlm.cli.main import app

run = CliRunner().invoke


def test_this_machine_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    result = run(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    found = {f["name"]: f for f in answer["findings"]}
    assert answer["ok"] and found["torch"]["value"].startswith("2.")
    assert found["cache"]["value"].startswith(str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists(), "doctor changes nothing"
    assert {"Python", "processor", "memory", "[eval]", "[trackers]"} <= set(found)


def test_missing_extra_comes_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def without(name: str) -> str:
        if name == "mlflow":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", without)
    found = {f.name: f for f in doctor.extras()}
    assert found["[trackers]"].level == "note"
    assert "mlflow" in found["[trackers]"].value and "tensorboard" not in found["[trackers]"].value
    assert found["[trackers]"].fix == "pip install 'fedlm[trackers]'"


def test_cache_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "file" / "cache"))
    result = run(app, ["doctor"])
    assert result.exit_code == 2
    assert "FAIL  cache" in result.stdout and "FEDLM_CACHE" in result.stdout


def test_registry_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: doctor.subprocess.CompletedProcess([], 1))
    result = run(app, ["doctor", "--network-check"])
    assert result.exit_code == 0
    assert "PyPI registry  does not answer" in result.stdout
