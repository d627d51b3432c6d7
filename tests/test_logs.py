"""Logs: every line is JSON when asked for, and never holds an exception's message."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlm import logs
from fedlm.errors import RunError
from fedlm.report.eventlog import SILOS, EventLog


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The root logger and the hook of uncaught errors are the process's: put them back."""
    root, hook = logging.getLogger(), sys.excepthook
    handlers, level, ours = root.handlers[:], root.level, logging.getLogger("fedlm").level
    monkeypatch.setenv(logs.VARIABLE, "")
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)
    logging.getLogger("fedlm").setLevel(ours)
    sys.excepthook = hook
    logging.captureWarnings(False)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_is_one_json_object(tmp_path: Path) -> None:
    file = tmp_path / "log"
    logs.configure(True, file, silo="hospital-a")
    logging.getLogger("fedlm.test").warning("two\nlines of %s", "words", extra={"round": 3})
    (line,) = lines(file)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "logger": "fedlm.test",
        "message": "two\nlines of words",
        "silo": "hospital-a",
        "round": 3,
    }
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_line_that_cannot_be_written_quotes_no_error_either(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logs.configure(False)
    with (tmp_path / "closed").open("w") as stream:
        monkeypatch.setattr(logging.getLogger().handlers[-1], "stream", stream)
    try:
        raise ValueError("words of a patient")
    except ValueError:
        logging.getLogger("fedlm.test").error("something failed")
    assert capsys.readouterr().err == "a log line of fedlm.test was lost: ValueError\n"


def test_an_exceptions_message_stays_out(tmp_path: Path) -> None:
    for as_json in (True, False):
        file = tmp_path / f"log-{as_json}"
        logs.configure(as_json, file)
        try:
            raise ValueError("the patient has")
        except ValueError:
            logging.getLogger("fedlm.test").exception("reading failed")
        text = file.read_text()
        assert "patient" not in text
        assert "ValueError" in text and "test_logs.py:" in text and text.count("\n") == 1


def test_what_libraries_log_badly_is_still_a_line(tmp_path: Path) -> None:
    file = tmp_path / "log"
    logs.configure(True, file)
    logging.getLogger("foreign").error("x" * 100_000)
    logging.getLogger("foreign").error("odd", extra={"thing": object()})
    warnings.warn("old", DeprecationWarning, stacklevel=1)
    long, odd, *_ = lines(file)
    assert len(long["message"]) < 10_000
    assert odd["thing"].startswith("<object")
    unfit = logging.makeLogRecord({"msg": "%d of them", "args": ("seven",)})
    assert json.loads(logs.JsonLines().format(unfit))["message"] == "%d of them"


def test_a_second_call_replaces_the_first(tmp_path: Path) -> None:
    logs.configure(True, tmp_path / "a")
    assert logs.as_json() and os.environ[logs.VARIABLE] == "json"
    logs.configure(False, tmp_path / "b")
    assert not logs.as_json() and not logs.wanted()
    logging.getLogger("fedlm.test").info("hello", extra={"round": 1})
    logging.getLogger("httpx").info("GET /")
    assert (tmp_path / "a").read_text() == ""
    assert (tmp_path / "b").read_text().split(" ", 1)[1] == "info fedlm.test: hello round=1\n"


def test_files_rotate_and_stay_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LARGEST_FILE", 1000)
    logs.configure(True, tmp_path / "log")
    for number in range(100):
        logging.getLogger("fedlm.test").info("line %d", number)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 1 + logs.OLD_FILES
    assert {f.stat().st_mode & 0o777 for f in files} == {0o600}


def test_bad_choices_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="cannot be written"):
        logs.configure(True, tmp_path / "nowhere" / "log")
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    with pytest.raises(RunError, match="FEDLM_LOG is 'yaml'"):
        logs.wanted()


def test_an_uncaught_error_is_a_line_without_its_message() -> None:
    code = "from fedlm import logs; logs.configure(True); raise ValueError('the patient has')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (line,) = [json.loads(text) for text in done.stderr.splitlines()]
    assert line["error"] == "ValueError" and "patient" not in done.stderr
    assert done.returncode == 1


def test_errors_of_a_command_are_lines_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from fedlm.cli.main import main; main()", "run", "nothing.yaml", "--json-logs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = [json.loads(text) for text in done.stderr.splitlines()]
    assert line["level"] == "error" and "nothing.yaml" in line["message"]


def test_events_become_lines_without_lists(tmp_path: Path) -> None:
    file = tmp_path / "log"
    logs.configure(True, file, role="run")
    display = EventLog()
    names = [f"silo-{i}" for i in range(SILOS + 50)]
    display({"kind": "run_started", "run": "news-1", "rounds": 2, "silos": names})
    for name in names:
        display({"kind": "step", "silo": name, "step": 0})
        display({"kind": "silo_done", "round": 0, "silo": name, "verb": "train", "losses": [1.0], "name": "x"})
    display({"kind": "silo_failed", "round": 0, "silo": "b", "failure": "refused", "reason": "policy"})
    display({"kind": "round_done", "round": 0, "loss": 1.5, "validation": {"loss": 2.5, "silos": {}}, "silos": {}})
    display.warn("no room")
    found = lines(file)
    assert found[0]["silos"] == len(names) and found[0]["run"] == "news-1"
    assert sum(line["message"] == "silo done" for line in found) == SILOS
    failed, done, warned = found[-3:]
    assert (failed["level"], failed["reason"]) == ("warning", "policy")
    assert (done["loss"], done["validation_loss"]) == (1.5, 2.5)
    assert (warned["level"], warned["message"], warned["role"]) == ("warning", "no room", "run")


def test_what_libraries_add_to_records_stays_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Ray puts `_ray_timestamp_ns` on every record of a process that it runs in."""
    logs.configure(True)
    logging.getLogger("fedlm.test").info("hello", extra={"round": 1, "_private": 2})
    line = json.loads(capsys.readouterr().err)
    assert line["round"] == 1 and "_private" not in line
