"""`fedlm coordinator start`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.federation.engines.flare.kit import Kit
from tests.federation.flare.parties import alive, demo_network, until


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    return demo_network(tmp_path_factory.mktemp("network"))


class Command:
    """A fedlm command that runs until it is told to end; its log lines."""

    def __init__(self, log: Path, *words: str) -> None:
        self._log = log
        with log.open("wb") as sink:
            program = "from fedlm.cli.main import main; main()"
            self.process = subprocess.Popen([sys.executable, "-c", program, *words], stdout=sink, stderr=sink)

    def text(self) -> str:
        return self._log.read_text()

    def says(self, text: str, seconds: float = 60.0) -> bool:
        return until(lambda: text in self.text(), seconds)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def test_what_cannot_start_is_a_sentence(kits: dict[str, Kit], tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        result = CliRunner().invoke(app, ["coordinator", "start", *words])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "not a kit" in refused(str(tmp_path))
    assert "the kit of a silo, not of a coordinator" in refused(str(kits["hospital-a"].path))
    with socket.socket() as other:
        other.bind(("127.0.0.1", kits["coordinator"].port))
        other.listen()
        assert "cannot be listened on" in refused(str(kits["coordinator"].path))


@pytest.mark.slow
def test_it_listens_comes_back_and_ends(kits: dict[str, Kit], tmp_path: Path, commands: list[Command]) -> None:
    kit = kits["coordinator"]
    first = Command(tmp_path / "log", "coordinator", "start", str(kit.path))
    commands.append(first)
    line = f"coordinator of hospitals listens on localhost:{kit.port}; 2 silos enrolled"
    assert first.says(line)
    assert "demo keys: all private keys were made in one place" in first.text()
    second = Command(tmp_path / "second", "coordinator", "start", str(kit.path))
    commands.append(second)
    assert second.process.wait(30) == 2
    assert f"runs already, as process {first.process.pid}" in second.text()
    (child,) = first.children()
    os.kill(child, signal.SIGKILL)
    assert until(lambda: first.text().count(line) == 2, 60.0)
    assert "killed by SIGKILL" in first.text()
    (child,) = first.children()
    assert first.end() == 0
    assert not alive(child)


@pytest.mark.slow
def test_json_logs_and_a_killed_supervisor(kits: dict[str, Kit], tmp_path: Path, commands: list[Command]) -> None:
    command = Command(tmp_path / "log", "coordinator", "start", str(kits["coordinator"].path), "--json-logs")
    commands.append(command)
    assert command.says("listens on")
    lines = [json.loads(line) for line in command.text().splitlines()]
    assert {line["role"] for line in lines} == {"coordinator"}
    inner = (kits["coordinator"].logs / "nvflare.log").read_text().splitlines()
    assert json.loads(inner[-1])["level"] in ("info", "warning", "error")
    (child,) = command.children()
    command.end(signal.SIGKILL)
    assert until(lambda: not alive(child), 10.0)
