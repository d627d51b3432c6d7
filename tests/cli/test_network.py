"""`fedlm network`, and `fedlm doctor --network`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from fedlm.cli.main import app
from fedlm.federation.engines.flare.kit import read_kit, socket_path
from fedlm.federation.engines.lines import Lines
from tests.federation.flare.parties import certificate, free_port


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def fedlm(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result


def described(port: int = 8002) -> None:
    text = fedlm("network", "new", "--example").stdout
    text = text.replace("fl.example.org ", "localhost ").replace("8002", str(port))
    text = text.replace("  - {name: hospital-c, org: hospital_c}\n", "")
    Path("consortium.yaml").write_text(text)


@pytest.fixture
def demo(folder: Path) -> Path:  # noqa: ARG001
    """Demo kits: ./net/coordinator, ./net/hospital-a, ./net/hospital-b."""
    described(free_port())
    fedlm("network", "new", "consortium.yaml", "--out", "net", "--demo-keys")
    return Path("net")


class Answering:
    """A relay that answers what it is told to."""

    def __init__(self, kit: Path, answer: dict[str, Any]) -> None:
        self.asked: list[dict[str, Any]] = []
        self.answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(socket_path(kit)))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                lines = Lines(self._listener.accept()[0])
            except OSError:
                return
            self.asked.append(lines.receive(5.0) or {})
            lines.send(self.answer)
            lines.close()

    def close(self) -> None:
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5.0)


@pytest.fixture
def relay(demo: Path) -> Iterator[Answering]:
    silo = {"last_seen": 2.2, "worker": True, "fedlm": "0.1.0", "clock_skew": -0.2, "free_memory": 2**31, "busy": None}
    silos = {
        "hospital-a": {**silo, "connected": True, "card": {"rows": 12, "tasks": ["instruct"]}, "busy": "training"},
        "hospital-b": {"connected": False, "worker": False, "last_seen": None, "revoked": True},
    }
    answering = Answering(demo / "coordinator", {"type": "status", "network": "hospitals", "silos": silos, "run": None})
    yield answering
    answering.close()


def test_a_whole_enrolment(folder: Path) -> None:
    described()
    text = fedlm("network", "new", "consortium.yaml", "--out", "office").stdout
    root = read_kit(Path("office/coordinator")).root
    assert root in text
    assert "demo" not in text
    text = fedlm("network", "join", "office/hospital-a.invitation.yaml").stdout
    assert root in text
    asked = json.loads(fedlm("network", "approve", "office/coordinator", "hospital-a.request.zip", "--json").stdout)
    assert asked["key"] in text
    fedlm("network", "join", "hospital-a.signed.zip", "--fingerprint", "00", code=2)
    assert "compare" not in fedlm("network", "join", "hospital-a.signed.zip", "--fingerprint", root).stdout.lower()
    assert read_kit(folder / "hospital-a").name == "hospital-a"
    assert "hospital-a has a certificate already" in (
        fedlm("network", "approve", "office/coordinator", "hospital-a.request.zip", code=2).stderr
    )
    added = fedlm("network", "add", "office/coordinator", "hospital-d", "--org", "d", "--json").stdout
    assert json.loads(added)["invitation"] == "hospital-d.invitation.yaml"
    assert read_kit(Path("office/coordinator")).silos == ("hospital-a", "hospital-b", "hospital-d")
    assert "cannot be 'd d'" in fedlm("network", "add", "office/coordinator", "d d", "--org", "d", code=2).stderr


def test_demo_keys_are_named_as_such(demo: Path) -> None:
    described(free_port())
    text = fedlm("network", "new", "consortium.yaml", "--out", "more", "--demo-keys").stdout
    assert "demo keys: all private keys were made in one place" in text
    said = json.loads(fedlm("network", "new", "consortium.yaml", "--out", "third", "--demo-keys", "--json").stdout)
    assert said["keys"] == "demo"
    assert said["silos"] == ["third/hospital-a", "third/hospital-b"]
    assert "there already" in fedlm("network", "new", "consortium.yaml", "--out", str(demo), code=2).stderr


def test_a_wrong_file_is_a_sentence() -> None:
    assert "--example" in fedlm("network", "new", code=2).stderr
    assert "none.yaml: cannot be read: No such file" in fedlm("network", "new", "none.yaml", code=2).stderr
    assert "not a kit" in fedlm("network", "status", ".", code=2).stderr
    assert "cannot be read" in fedlm("network", "join", "none.invitation.yaml", code=2).stderr


def test_status_is_a_table(relay: Answering, demo: Path) -> None:
    text = fedlm("network", "status", str(demo / "coordinator")).stdout
    (line,) = [line for line in text.splitlines() if "hospital-a" in line]
    for word in ("connected", "2 s ago", "training", "0.1.0", "-0.2 s", "2.0 GiB", "rows 12, tasks instruct"):
        assert word in line
    (line,) = [line for line in text.splitlines() if "hospital-b" in line]
    assert "revoked" in line
    assert "no run" in text
    assert json.loads(fedlm("network", "status", str(demo / "coordinator"), "--json").stdout) == relay.answer
    assert relay.asked == [{"type": "status"}] * 2
    error = fedlm("network", "status", str(demo / "hospital-a"), code=2).stderr
    assert "does not run here. Fix: is `fedlm silo start` running?" in error


def test_a_silos_own_status(demo: Path) -> None:
    answer = {"type": "status", "name": "hospital-a", "connected": True, "worker": False, "busy": None}
    answering = Answering(demo / "hospital-a", answer)
    try:
        text = fedlm("network", "status", str(demo / "hospital-a")).stdout
    finally:
        answering.close()
    assert text.splitlines() == ["hospital-a of hospitals", "coordinator: connected", "worker: not there"]


def test_revoking(relay: Answering, demo: Path) -> None:
    kit = str(demo / "coordinator")
    relay.answer = {"type": "ok"}
    assert fedlm("network", "revoke", kit, "hospital-b").stdout == "hospital-b is refused at once\n"
    assert "accepted again at once" in fedlm("network", "restore", kit, "hospital-b").stdout
    assert relay.asked == [{"type": "revoke", "silo": "hospital-b"}, {"type": "restore", "silo": "hospital-b"}]
    relay.answer = {"type": "error", "reason": "disk full"}
    assert "disk full" in fedlm("network", "revoke", kit, "hospital-b", code=2).stderr
    assert "not enrolled" in fedlm("network", "revoke", kit, "hospital-x", code=2).stderr
    relay.close()
    said = json.loads(fedlm("network", "revoke", kit, "hospital-b", "--json").stdout)
    assert said == {"silo": "hospital-b", "revoked": True, "running": False}


def findings(kit: Path, code: int = 0) -> dict[str, dict[str, str]]:
    report = json.loads(fedlm("doctor", "--network", str(kit), "--json", code=code).stdout)
    assert report["ok"] is (code == 0)
    return {finding["name"]: finding for finding in report["findings"]}


def test_the_doctor_looks_at_a_coordinator(relay: Answering, demo: Path) -> None:
    kit = read_kit(demo / "coordinator")
    # the relay answers, but nobody listens on the port: the process is half dead
    found = findings(kit.path, code=2)
    assert found["connection"]["level"] == "problem"
    assert "cannot be reached" in found["connection"]["value"]
    assert found["hospital-a"]["level"] == "ok"
    assert found["hospital-b"]["value"] == "revoked"
    assert found["operator"]["value"] == "ops@example.org may run"
    relay.answer["silos"]["hospital-a"]["clock_skew"] = 9.0
    assert "its clock is +9 s from ours" in findings(kit.path, code=2)["hospital-a"]["value"]
    relay.close()
    found = findings(kit.path)
    assert found["port"]["value"] == f"{kit.port} is free"
    assert found["relay"]["fix"].startswith("fedlm coordinator start")
    with socket.socket() as other:
        other.bind(("127.0.0.1", kit.port))
        other.listen()
        assert "cannot be listened on" in findings(kit.path, code=2)["coordinator"]["value"]
        # from a silo, too: what listens there is no coordinator
        found = findings(demo / "hospital-a", code=2)
        assert "does not answer as a coordinator" in found["connection"]["value"]


def test_the_doctor_looks_at_a_silo(demo: Path) -> None:
    kit = read_kit(demo / "hospital-a")
    found = findings(kit.path, code=2)
    assert found["certificate"]["level"] == found["permissions"]["level"] == found["host"]["level"] == "ok"
    assert "demo keys" in found["kit"]["value"]
    assert "Connection refused" in found["connection"]["value"]
    kit.certificate.write_bytes(certificate(kit, read_kit(demo / "coordinator").ca, start=1, end=2))
    assert "set the clock" in findings(kit.path, code=2)["certificate"]["fix"]
    kit.key.chmod(0o644)
    assert "can be read by other users" in findings(kit.path, code=2)["permissions"]["value"]
    (kit.path / "kit.yaml").write_text((kit.path / "kit.yaml").read_text().replace("localhost", "none.invalid"))
    assert "none.invalid has no address here" in findings(kit.path, code=2)["way to the coordinator"]["value"]
    assert "not a kit" in findings(Path(), code=2)["kit"]["value"]
