"""Keeping processes alive, ending them, and what is refused before they start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare import processes
from fedlm.federation.engines.flare.ask import change_access, revoked, status_of
from fedlm.federation.engines.flare.kit import Kit, socket_path
from fedlm.federation.engines.flare.processes import Child, check_port, only_one, supervise
from fedlm.federation.engines.flare.start import check_ready, version_warnings
from fedlm.federation.engines.flare.views import Twins
from fedlm.federation.engines.lines import Lines
from tests.federation.flare.parties import alive, certificate, demo_network, until

Program = Callable[[str], Child]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A child that runs this code; `note(text)` appends to the file `notes`."""
    folder = tmp_path / "modules"
    folder.mkdir()

    def make(code: str) -> Child:
        name = f"program_{len(list(folder.glob('*.py')))}"
        helper = "import os, signal, sys, time\ndef note(t):\n    open(os.environ['NOTES'], 'a').write(t + '\\n')\n"
        (folder / f"{name}.py").write_text(helper + code)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        environment = {"PYTHONPATH": path, "NOTES": str(tmp_path / "notes")}
        return Child(name, name, [], tmp_path / "out", environment)

    return make


def notes(tmp_path: Path) -> list[str]:
    file = tmp_path / "notes"
    return file.read_text().split() if file.exists() else []


class Supervised:
    """`supervise` in a thread."""

    def __init__(self, *children: Child) -> None:
        self.stop = threading.Event()
        self.error: NetworkError | None = None
        self._thread = threading.Thread(target=self._run, args=[list(children)])

    def _run(self, children: list[Child]) -> None:
        try:
            supervise(children, self.stop)
        except NetworkError as error:
            self.error = error

    def __enter__(self) -> Supervised:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join()

    def over(self) -> bool:
        return not self._thread.is_alive()


def test_a_killed_process_is_started_again_and_all_end_in_order(program: Program, tmp_path: Path) -> None:
    child, other = program("note(str(os.getpid())); time.sleep(60)"), program("time.sleep(60)")
    with Supervised(child, other):
        assert until(lambda: len(notes(tmp_path)) == 1 and other.process is not None)
        assert other.process is not None
        survivor = other.process.pid
        first = int(notes(tmp_path)[0])
        os.kill(first, signal.SIGKILL)
        assert until(lambda: len(notes(tmp_path)) == 2)
        assert other.process.pid == survivor
        second = int(notes(tmp_path)[1])
        assert alive(second)
        assert child.restarts == 1
    assert not alive(second)  # waited for, so certainly gone
    assert not alive(survivor)


def test_a_process_that_keeps_ending_is_given_up(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LONGEST_PAUSE", 0.05)
    with Supervised(program("note('x'); sys.exit(7)")) as supervised:
        assert until(supervised.over)
    assert "5 times in a row right after its start (exit code 7)" in str(supervised.error)
    assert len(notes(tmp_path)) == 5


def test_one_that_is_killed_again_and_again_is_not_given_up(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LONGEST_PAUSE", 0.05)
    with Supervised(program("note('x'); os.kill(os.getpid(), signal.SIGKILL)")) as supervised:
        assert until(lambda: len(notes(tmp_path)) > 6)
    assert supervised.error is None


def test_a_fault_for_a_person_to_mend_is_not_retried(program: Program, tmp_path: Path) -> None:
    other = program("time.sleep(60)")
    with Supervised(other, program("note('x'); sys.exit(2)")) as supervised:
        assert until(supervised.over)
    assert "cannot go on" in str(supervised.error)
    assert notes(tmp_path) == ["x"]
    assert other.process is None


def test_pauses_grow_and_a_steady_life_ends_them(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(processes.time, "monotonic", lambda: now)
    child = program("")

    class Dead:
        pid, stdin = 2**22 + 1, Path(os.devnull).open("rb")  # noqa: SIM115

        def poll(self) -> int:
            return -9

        def wait(self) -> int:
            return -9

    pauses = []
    for lived in (1, 1, 1, 1, 1, 1, 1, 31, 1):
        child.process, child.born = Dead(), now - lived  # type: ignore[assignment]
        child.look()
        pauses.append(child.due - now)
    assert pauses == [0, 1, 2, 4, 8, 16, 30, 0, 1]


def test_a_process_that_will_not_end_is_killed(
    program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.3)
    code = (
        "import subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "grandchild = subprocess.Popen(['sleep', '60'])\n"
        "note(str(os.getpid())); note(str(grandchild.pid)); time.sleep(60)"
    )
    with Supervised(program(code)):
        assert until(lambda: len(notes(tmp_path)) == 2)
        began = time.monotonic()
    assert time.monotonic() - began < 10.0
    assert until(lambda: not any(alive(int(pid)) for pid in notes(tmp_path)), 5.0)


def test_children_end_with_a_killed_supervisor(tmp_path: Path, program: Program) -> None:
    child = program("note(str(os.getpid())); time.sleep(60)")
    code = (
        "import threading\nfrom pathlib import Path\n"
        "from fedlm.federation.engines.flare.processes import Child, supervise\n"
        f"supervise([Child('c', {child.module!r}, [], Path({str(tmp_path / 'out')!r}), {child.environment!r})], "
        "threading.Event())\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert until(lambda: len(notes(tmp_path)) == 1)
        pid = int(notes(tmp_path)[0])
        assert alive(pid)
    finally:
        supervisor.kill()
        supervisor.wait()
    assert until(lambda: not alive(pid), 5.0)


def test_what_a_child_writes_is_private_and_it_has_no_keyboard(program: Program, tmp_path: Path) -> None:
    child = program("note(repr(sys.stdin.read())); time.sleep(60)")
    with Supervised(child):
        assert until(lambda: notes(tmp_path) == ["''"])
    assert (tmp_path / "notes").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    demo_network(folder)
    return folder


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> dict[str, Kit]:
    """Kits that a test may spoil."""
    from fedlm.federation.engines.flare.kit import read_kit

    shutil.copytree(made, tmp_path / "kits")
    return {folder.name: read_kit(folder) for folder in (tmp_path / "kits").iterdir()}


def test_a_good_kit_is_ready(kits: dict[str, Kit]) -> None:
    for kit in kits.values():
        (warning,) = check_ready(kit)
        assert "demo keys" in warning
        assert check_ready(replace(kit, keys="own")) == []


@pytest.mark.parametrize("name", ["coordinator", "hospital-a"])
def test_a_key_that_others_can_read_is_refused(kits: dict[str, Kit], name: str) -> None:
    kits[name].key.chmod(0o640)
    with pytest.raises(NetworkError, match=r"can be read by other users.* Fix: chmod 600"):
        check_ready(kits[name])


def test_the_operators_and_the_cas_keys_too(kits: dict[str, Kit]) -> None:
    for key in (kits["coordinator"].operator / "client.key", kits["coordinator"].ca / "rootCA.key"):
        key.chmod(0o604)
        with pytest.raises(NetworkError, match="can be read by other users"):
            check_ready(kits["coordinator"])
        key.chmod(0o600)


def test_certificates_are_looked_at_before_anything_starts(kits: dict[str, Kit], tmp_path: Path) -> None:
    kit, ca = kits["hospital-a"], kits["coordinator"].ca
    good = kit.certificate.read_bytes()
    for start, end, reason in (
        (-20.0, -1.0, "the certificate expired on"),
        (0.5, 9.0, r"is not valid before .* and this machine's clock says .* Fix: set the clock"),
    ):
        kit.certificate.write_bytes(certificate(kit, ca, start=start, end=end))
        with pytest.raises(NetworkError, match=reason):
            check_ready(kit)
    kit.certificate.write_bytes(certificate(kit, ca, start=-1, end=9))
    assert any("expires in 9 days" in warning for warning in check_ready(kit))
    other = demo_network(tmp_path / "other")["hospital-a"]
    kit.certificate.write_bytes(other.certificate.read_bytes())
    with pytest.raises(NetworkError, match="was not signed by this network's root"):
        check_ready(kit)
    kit.certificate.write_bytes(kits["hospital-b"].certificate.read_bytes())
    with pytest.raises(NetworkError, match="the private key is not the certificate's"):
        check_ready(kit)
    kit.certificate.write_bytes(b"junk")
    with pytest.raises(NetworkError, match="not a PEM certificate"):
        check_ready(kit)
    kit.certificate.unlink()
    with pytest.raises(NetworkError, match="cannot be read"):
        check_ready(kit)
    kit.certificate.write_bytes(good)
    check_ready(kit)


def test_versions() -> None:
    assert version_warnings("0.1.0", "0.1.0") == []
    assert version_warnings("0.1.0", "0.2.0") == []
    assert "made by fedlm 0.3.0, this is fedlm 0.2.0" in version_warnings("0.3.0", "0.2.0")[0]
    assert version_warnings("0.9.0", "1.0.0")


def test_one_kit_runs_once(kits: dict[str, Kit]) -> None:
    kit = kits["coordinator"]
    code = f"""
import time
from fedlm.federation.engines.flare.kit import read_kit
from fedlm.federation.engines.flare.processes import only_one
with only_one(read_kit({str(kit.path)!r})):
    print('held', flush=True); time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(NetworkError, match=f"runs already, as process {holder.pid}"), only_one(kit):
            raise AssertionError
    finally:
        holder.kill()
        holder.wait()
    with only_one(kit):  # a killed holder leaves nothing behind
        pass


def test_a_busy_port_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(NetworkError, match=rf"port {port} cannot be listened on: Address already in use"):
            check_port("localhost", port, patience=0.3)
        assert time.monotonic() - began > 0.3
        threading.Timer(0.5, listener.close).start()
        check_port("localhost", port, patience=5.0)


def test_revoking_while_nothing_runs(kits: dict[str, Kit]) -> None:
    kit = kits["coordinator"]
    assert change_access(kit, "hospital-b", restore=False) is False
    assert json.loads((kit.workspace / "disabled_clients.json").read_text()) == {"disabled_clients": ["hospital-b"]}
    assert revoked(kit) == ["hospital-b"]
    assert change_access(kit, "hospital-b", restore=True) is False
    assert revoked(kit) == []
    with pytest.raises(NetworkError, match=r"'hospital-x' is not enrolled .* did you mean"):
        change_access(kit, "hospital-x", restore=False)
    (kit.workspace / "disabled_clients.json").write_text("{}")
    with pytest.raises(NetworkError, match="damaged"):
        change_access(kit, "hospital-b", restore=True)


def test_asking_a_relay(kits: dict[str, Kit]) -> None:
    kit = kits["coordinator"]
    with pytest.raises(NetworkError, match=r"does not run here\. Fix: is `fedlm coordinator start` running"):
        status_of(kit)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(socket_path(kit.path)))
        with pytest.raises(NetworkError, match="does not run here"):
            status_of(kit)  # a socket that a killed process left behind
        listener.listen()

        def answer(reply: dict[str, object] | None) -> None:
            lines = Lines(listener.accept()[0])
            lines.receive(5.0)
            if reply is not None:
                lines.send(reply)
            lines.close()

        for reply, outcome in (
            ({"type": "status", "n": 1}, None),
            ({"type": "error", "reason": "no"}, "no"),
            (None, "does not answer"),
        ):
            thread = threading.Thread(target=answer, args=[reply])
            thread.start()
            if outcome is None:
                assert status_of(kit) == reply
            else:
                with pytest.raises(NetworkError, match=outcome):
                    status_of(kit)
            thread.join()


def test_two_machines_with_one_kit_are_noticed(tmp_path: Path) -> None:
    log = tmp_path / "nvflare.log"
    log.write_text("Connection CN1 is evicted for CN2 from endpoint hospital-a for exceeding limit 1\n" * 9)
    twins = Twins(log)
    assert twins.look(0.0) == []  # what was there before does not count

    def evict(silo: str, now: float) -> list[str]:
        with log.open("a") as handle:
            handle.write(f"x: Connection CN1 is evicted for CN2 from endpoint {silo} for exceeding limit 1\n")
        return twins.look(now)

    assert [evict("hospital-a", now) for now in (0.0, 10.0, 20.0, 30.0)] == [[], [], ["hospital-a"], []]
    assert [evict("hospital-b", now) for now in (0.0, 50.0, 100.0, 150.0)] == [[]] * 4  # a line that breaks at times
    log.write_text("")
    assert twins.look(700.0) == []
    assert [evict("hospital-a", now) for now in (710.0, 711.0, 712.0)] == [[], [], ["hospital-a"]]
