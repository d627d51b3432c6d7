"""`fedlm report`: rebuilds the page and says in short what it says."""

from __future__ import annotations

import json
import webbrowser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from tests.report.made_up import write_run


def test_the_page_is_rebuilt_and_summed_up(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", comparison=True)
    answer = CliRunner().invoke(app, ["report", str(run)])
    assert answer.exit_code == 0
    assert answer.stdout.startswith("Federating helped")
    assert any(line.startswith("federated") for line in answer.stdout.splitlines())
    assert f"Wrote {run / 'report.html'}" in answer.stdout
    assert (run / "report.html").exists()


def test_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", done=2)
    answer = CliRunner().invoke(app, ["report", str(run), "--json"])
    value = json.loads(answer.stdout)
    assert value["status"] == "interrupted" and value["rounds_done"] == 2
    assert value["held_out"]["rows"] == "validation"


def test_open_shows_the_page_in_the_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    run = write_run(tmp_path / "run")
    assert CliRunner().invoke(app, ["report", str(run), "--open"]).exit_code == 0
    assert opened == [(run / "report.html").resolve().as_uri()]
