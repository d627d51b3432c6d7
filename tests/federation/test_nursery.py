"""Worker processes that are forked from one which has imported the libraries: who ends when, and with which code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedlm.errors import RunError
from fedlm.federation.engines.nursery import Forked, Nursery, forks

pytestmark = pytest.mark.skipif(not forks(), reason="workers are forked on Linux without a GPU only")

Start = Callable[..., Forked]


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def nursery() -> Nursery:
    return Nursery()


@pytest.fixture
def start(nursery: Nursery, tmp_path: Path) -> Iterator[Start]:
    """Starts a worker that waits for its first message."""
    held: list[socket.socket] = []

    def begin(of: Nursery = nursery, **environment: str) -> Forked:
        ours, theirs = socket.socketpair()
        held.append(ours)
        with theirs, (tmp_path / "log").open("ab") as log:
            return of.start(theirs, log, {**os.environ, **environment})

    yield begin
    for end in held:
        end.close()


def test_workers_are_children_of_one_process_with_one_thread(start: Start) -> None:
    """One thread: a lock that another one held would stay locked in every fork. (jemalloc, in pyarrow, takes its own
    locks before a fork.)"""
    first, second = start(), start(OMP_NUM_THREADS="7")
    parents = {psutil.Process(worker.pid).ppid() for worker in (first, second)}
    assert len(parents) == 1 and psutil.Process(*parents).ppid() == os.getpid()
    tasks = Path(f"/proc/{min(parents)}/task").iterdir()
    assert [name for task in tasks if (name := (task / "comm").read_text()) != "jemalloc_bg_thd\n"] == ["python\n"]
    assert os.getsid(first.pid) == first.pid
    assert first.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(timeout=0.05)
    for worker in (first, second):
        worker.kill()
        assert worker.wait(timeout=30) == -signal.SIGKILL == worker.poll()


def test_a_frozen_worker_is_ended(start: Start) -> None:
    worker = start()
    os.kill(worker.pid, signal.SIGSTOP)
    worker.kill()
    assert worker.wait(timeout=30) == -signal.SIGKILL


def test_a_worker_whose_engine_is_gone_ends_and_says_so(nursery: Nursery, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs, (tmp_path / "log").open("ab") as log:
        worker = nursery.start(theirs, log, dict(os.environ))
    ours.close()
    assert worker.wait(timeout=30) == 1
    assert "ClosedError" in (tmp_path / "log").read_text()


def test_a_killed_nursery_takes_its_workers_along_and_another_one_starts(start: Start) -> None:
    worker = start()
    process = psutil.Process(worker.pid)
    parent = process.ppid()
    until(lambda: os.getsid(worker.pid) == worker.pid)
    os.kill(parent, signal.SIGKILL)
    assert worker.wait(timeout=30) == -signal.SIGKILL
    until(lambda: ended(process))
    again = start()
    assert again.poll() is None and psutil.Process(again.pid).ppid() != parent
    again.kill()


def test_it_ends_when_it_is_idle(start: Start) -> None:
    short = Nursery(idle=0.2)
    worker = start(short)
    parent = psutil.Process(worker.pid).parent()
    assert parent is not None
    worker.kill()
    until(lambda: ended(parent))
    another = start(short)
    assert another.poll() is None
    another.kill()


def test_another_environment_is_another_nursery(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries read some of it when they are imported."""
    before = start()
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "anything")
    after = start()
    assert psutil.Process(before.pid).ppid() != psutil.Process(after.pid).ppid()
    assert before.poll() is None  # it goes on
    assert psutil.Process(after.pid).environ()["HF_HUB_DISABLE_TELEMETRY"] == "anything"
    for worker in (before, after):
        worker.kill()


def test_nothing_is_left_when_the_process_that_asked_is_killed() -> None:
    code = """
import os, socket, time
from fedlm.errors import RunError
from fedlm.federation.engines.nursery import Nursery
ours, theirs = socket.socketpair()
worker = Nursery().start(theirs, open(os.devnull, "ab"), dict(os.environ))
print(worker.pid, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        pid = int(process.stdout.readline())
    found = psutil.Process(pid), psutil.Process(pid).parent()
    process.kill()
    process.wait()
    until(lambda: all(one is None or ended(one) for one in found))


def test_one_that_cannot_start_is_a_sentence(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunError, match=r"ended while starting.*federation.workers"):
        start(Nursery())
