"""`fedlm silo start`."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.federation.engines.flare.kit import Kit
from tests.cli.test_coordinator import Command
from tests.federation.flare.parties import alive, demo_network, free_port, until


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kit]:
    return demo_network(tmp_path_factory.mktemp("network"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    file = tmp_path / "data.yaml"
    file.write_text("sources:\n  - {name: notes, path: rows.jsonl, columns: {text: text}}\n")
    (tmp_path / "policy.yaml").write_text("{}\n")
    return file


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    started: list[Command] = []
    yield started
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


def test_what_cannot_start_is_a_sentence(kits: dict[str, Kit], data: Path) -> None:
    def refused(*words: str) -> str:
        result = CliRunner().invoke(app, ["silo", "start", *words])
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "the kit of a coordinator, not of a silo" in refused(str(kits["coordinator"].path), "--data", str(data))
    assert "none.yaml: there is no such file" in refused(str(kits["hospital-a"].path), "--data", "none.yaml")
    assert "--data" in refused(str(kits["hospital-a"].path))
    told = refused(str(kits["hospital-a"].path), "--data", str(data))
    assert "this silo has no policy" in told and "fedlm silo policy --example > policy.yaml" in told


@pytest.mark.slow
def test_it_connects_survives_deaths_and_ends(
    kits: dict[str, Kit], data: Path, tmp_path: Path, commands: list[Command]
) -> None:
    port = free_port()
    own = ("--data", str(data), "--policy", str(tmp_path / "policy.yaml"))
    words = ("silo", "start", str(kits["hospital-a"].path), *own, "--metrics-port", str(port))
    silo = Command(tmp_path / "silo", *words)
    commands.append(silo)
    # a silo may start first; it waits for the coordinator
    assert silo.says("not connected to hospitals", 40.0)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
    assert caught.value.code == 503
    coordinator = Command(tmp_path / "coordinator", "coordinator", "start", str(kits["coordinator"].path))
    commands.append(coordinator)
    assert silo.says("connected to hospitals at")
    assert silo.says("fedlm.network: the worker is ready")
    assert coordinator.says("hospital-a is connected")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
        assert json.load(answer) == {
            "silo": "hospital-a",
            "network": "hospitals",
            "restarts": 0,
            "connected": True,
            "worker": True,
        }
    for child in silo.children():
        before = silo.text().count("is started again")
        os.kill(child, signal.SIGKILL)
        assert until(lambda before=before: silo.text().count("is started again") > before)  # type: ignore[misc]
    assert until(lambda: silo.text().count("fedlm.network: the worker is ready") == 2)
    assert until(lambda: silo.text().count("connected to hospitals at") >= 2)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert "fedlm_silo_restarts 2.0" in answer.read().decode()
    children = silo.children()
    assert silo.end(signal.SIGINT) == 0
    assert len(children) == 2
    assert not any(alive(child) for child in children)
    assert coordinator.end() == 0


@pytest.mark.slow
def test_a_workers_refusal_ends_the_silo(kits: dict[str, Kit], tmp_path: Path, commands: list[Command]) -> None:
    (tmp_path / "data.yaml").write_text("sauces: []\n")
    (tmp_path / "policy.yaml").write_text("{}\n")
    own = ("--data", str(tmp_path / "data.yaml"), "--policy", str(tmp_path / "policy.yaml"))
    silo = Command(tmp_path / "log", "silo", "start", str(kits["hospital-b"].path), *own)
    commands.append(silo)
    assert silo.process.wait(60) == 2
    assert "sauces" in silo.text()
    assert "the worker cannot go on: its message is above" in silo.text()
