"""A comparison or a bench that is killed, or interrupted with Ctrl-C, goes on and ends in the same numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
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


@pytest.fixture(scope="module")
def file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed") / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path


@pytest.fixture(scope="module")
def truth(file: Path) -> dict[str, Any]:
    """What a comparison that nothing interrupts finds."""
    return metrics(start(file, file.parent / "whole").communicate(timeout=500)[0])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_it_goes_on_where_it_was(file: Path, truth: dict[str, Any], tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "run"
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


def bench(file: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    arguments = ["bench", "algorithms", str(file), "--methods", "fedit,ditto", "--lrs", "2", "--seeds", "1,2"]
    return subprocess.Popen(
        [sys.executable, "-c", "from fedlm.cli.main import main; main()", *arguments, "--out", str(out), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def same_in_every_run(out: Path) -> list[dict[str, Any]]:
    clock = ("seconds", "server_seconds", "wall_seconds", "peak_rss")
    return [
        {name: value for name, value in row.items() if name not in clock}
        for row in json.loads((out / "bench.json").read_text())["rows"]
    ]


def processes_of(session: int) -> list[int]:
    """Those that live in a session, by the kernel's list."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


@pytest.fixture(scope="module")
def rows(file: Path) -> list[dict[str, Any]]:
    """What a bench that nothing interrupts finds."""
    out = file.parent / "bench"
    whole = bench(file, out, "--workers", "2")
    _, errors = whole.communicate(timeout=900)
    assert whole.returncode == 0, errors.decode()[-2000:]
    return same_in_every_run(out)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_bench_goes_on_where_it_was(
    file: Path, rows: list[dict[str, Any]], tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = bench(file, out, "--workers", "1")
    deadline = time.monotonic() + 600
    while not (out / "results").is_dir() or len(list((out / "results").iterdir())) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read().decode()[-2000:]
        time.sleep(0.05)
    os.kill(process.pid, how)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130), errors.decode()[-2000:]
    deadline = time.monotonic() + 120
    while processes_of(process.pid):  # no training goes on for nobody
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}

    again = bench(file, out, "--resume")
    _, errors = again.communicate(timeout=900)
    assert again.returncode == 0, errors.decode()[-2000:]
    assert same_in_every_run(out) == rows
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (out / "results").iterdir()}.items()
