"""A comparison that is killed, or interrupted with Ctrl-C, goes on and ends in the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fedlm.recipe.load import dump_recipe
from fedlm.recipe.schema import Recipe


def start(file: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = ["compare", str(file), "--run-dir", str(folder), "--workers", "2", "--no-report", "--json", *more]
    return subprocess.Popen(
        [sys.executable, "-c", "from fedlm.cli.main import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def metrics(output: bytes) -> dict[str, Any]:
    return {arm["arm"]: arm["metrics"] for arm in json.loads(output)["arms"]}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_it_goes_on_where_it_was(recipe: Recipe, tmp_path: Path, how: signal.Signals) -> None:
    file, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(dump_recipe(recipe))
    whole = start(file, tmp_path / "whole")
    truth = metrics(whole.communicate(timeout=500)[0])

    process = start(file, folder)
    deadline = time.monotonic() + 300
    while not (folder / "arms" / "centralised" / "rounds.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()[-2000:]
        time.sleep(0.05)
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130), errors.decode()[-2000:]
    if how is not signal.SIGKILL:
        assert b"--resume" in errors
    assert not (folder / "comparison.json").exists()

    again = start(file, folder, "--resume")
    output, errors = again.communicate(timeout=500)
    assert again.returncode == 0, errors.decode()[-2000:]
    assert metrics(output) == truth
