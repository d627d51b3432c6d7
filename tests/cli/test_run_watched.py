"""`fedlm run` while someone watches: figures and health over HTTP, JSON lines instead of a display."""

from __future__ import annotations

import json
import logging
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedlm import logs
from tests.cli.test_run import call, place  # noqa: F401


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def log_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging belongs to the whole process."""
    monkeypatch.setenv(logs.VARIABLE, "")
    yield
    logs.configure(False)
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if handler.get_name() == logs.OURS:
            root.removeHandler(handler)
    logging.captureWarnings(False)


def watch(port: int, path: str, bodies: list[str], done: threading.Event) -> None:
    while not done.is_set():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as reply:
                bodies.append(reply.read().decode())
        except (urllib.error.URLError, ConnectionError):
            pass  # it has not begun, or has ended
        done.wait(0.02)


@pytest.mark.usefixtures("place")
def test_a_run_can_be_watched(port: int) -> None:
    seen: dict[str, list[str]] = {"metrics": [], "health": []}
    done = threading.Event()
    watchers = [threading.Thread(target=watch, args=[port, path, seen[path], done]) for path in seen]
    for watcher in watchers:
        watcher.start()
    try:
        answer = call("run", "recipe.yaml", "--run-dir", "runs/a", "--no-report", "--metrics-port", port)
    finally:
        done.set()
        for watcher in watchers:
            watcher.join()
    assert answer.exit_code == 0, answer.output
    assert any("\nfedlm_rounds_done 1.0\n" in body for body in seen["metrics"])
    states = [json.loads(body) for body in seen["health"]]
    assert {"status": "running", "round": 0}.items() <= max(states, key=lambda s: s["round"] == 0).items()
    with pytest.raises(ConnectionRefusedError):  # nothing is left behind
        socket.create_connection(("127.0.0.1", port), timeout=1)


@pytest.mark.usefixtures("place")
def test_a_busy_port_stops_before_anything_is_done(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        answer = call("run", "recipe.yaml", "--run-dir", "runs/a", "--metrics-port", port)
    assert answer.exit_code == 2 and "metrics cannot be served" in answer.stderr
    assert not Path("runs").exists()


@pytest.mark.usefixtures("place", "log_as_before")
def test_json_lines_replace_the_display(capfd: pytest.CaptureFixture[str]) -> None:
    answer = call("run", "recipe.yaml", "--run-dir", "runs/a", "--no-report", "--json", "--json-logs")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["status"] == "finished"
    lines = [json.loads(line) for line in (answer.stderr + capfd.readouterr().err).splitlines()]
    assert [line["round"] for line in lines if line["message"] == "round done"] == [-1, 0, 1]
    assert {line["role"] for line in lines} == {"run"}
