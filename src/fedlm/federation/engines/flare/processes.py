"""Keeping a party's processes alive: each is started again when it dies, and all end with their supervisor.

Failure semantics. A process that dies is started again at once the first time, then after 1, 2, 4 ... 30 seconds; one
that lived for a while starts afresh. One that keeps ending by itself within seconds, or that says the fault is for a
person to mend (exit code 2), ends the supervisor with a clear error. One that was killed from outside (a signal, the
system short of memory) is always started again. If the supervisor itself is killed, its children end too: see
`launch.py`. A second supervisor of the same kit is refused by a lock that the kernel holds, so none is left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.kit import Kit, private_folder

log = logging.getLogger("fedlm.supervisor")

INSTANT_SECONDS = 10.0
"""A process that ends sooner did not really start."""

INSTANT_DEATHS = 5
"""That many in a row, by itself, and it is given up."""

STEADY_SECONDS = 30.0
"""A process that lived longer is started again without a pause."""

LONGEST_PAUSE = 30.0
STOP_SECONDS = 15.0
MENDABLE = 2
"""Exit code by which fedlm's own programs say that a person must mend something."""

_TICK = 0.1


@dataclass
class Child:
    """One process to keep alive."""

    name: str
    module: str
    arguments: list[str]
    output: Path | None = None
    """File for what it prints; the supervisor's own output when None."""
    environment: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    """What the command begins with, e.g. to run in a network namespace."""
    process: subprocess.Popen[bytes] | None = None
    born: float = 0.0
    due: float = 0.0
    """When to start it next, by the monotonic clock."""
    deaths: int = 0
    """In a row, each soon after its start."""
    instant: int = 0
    restarts: int = 0

    def start(self) -> None:
        """Start it, in a process group of its own: Ctrl-C reaches the supervisor alone, which ends it in order."""
        launcher = [sys.executable, "-u", "-m", "fedlm.federation.engines.flare.launch"]
        with _sink(self.output) as sink:
            self.process = subprocess.Popen(
                [*self.prefix, *launcher, self.module, *self.arguments],
                stdin=subprocess.PIPE,
                stdout=sink,
                stderr=subprocess.STDOUT if sink else None,
                start_new_session=True,
                env={**os.environ, **self.environment},
            )
        self.born = time.monotonic()

    def look(self) -> None:
        """Start it if it is due; notice that it died.

        Raises:
            NetworkError: it ends again and again, or says that a person must mend something.
        """
        if self.process is None:
            if time.monotonic() >= self.due:
                self.start()
            return
        code = self.process.poll()
        if code is None:
            if self.deaths and time.monotonic() - self.born > STEADY_SECONDS:
                self.deaths = self.instant = 0
            return
        lived = time.monotonic() - self.born
        self._reap()
        if code == MENDABLE:
            raise NetworkError(f"the {self.name} cannot go on: its message is {self._where()}")
        self.deaths = self.deaths + 1 if lived < STEADY_SECONDS else 1
        self.instant = self.instant + 1 if lived < INSTANT_SECONDS and code >= 0 else 0
        if self.instant >= INSTANT_DEATHS:
            raise NetworkError(
                f"the {self.name} ended {self.instant} times in a row right after its start (exit code {code})",
                fix=f"its message is {self._where()}; `fedlm doctor --network KIT` looks for the usual reasons",
            )
        pause = 0.0 if self.deaths == 1 else min(LONGEST_PAUSE, 2.0 ** (self.deaths - 2))
        self.due = time.monotonic() + pause
        self.restarts += 1
        log.warning(
            "the %s ended (%s), it is started again%s",
            self.name,
            _cause(code),
            f" in {pause:.0f} s" if pause else "",
            extra={"child": self.name, "code": code},
        )

    def stop(self) -> None:
        """Ask it to end, and end it and whatever it started if it does not."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the %s does not end, it is killed", self.name, extra={"child": self.name})
        self._reap()

    def _reap(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group that is gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process = None

    def _where(self) -> str:
        return f"in {self.output}" if self.output else "above"


def supervise(children: list[Child], stop: threading.Event, watch: Callable[[], None] = lambda: None) -> None:
    """Keep the children alive until `stop` is set; they have ended when this returns or raises.

    Args:
        children: what to run.
        stop: set it to end.
        watch: called every second or so while they run.

    Raises:
        NetworkError: one of them cannot be kept alive.
    """
    due = 0.0
    try:
        while not stop.is_set():
            for child in children:
                child.look()
            if time.monotonic() >= due:
                watch()
                due = time.monotonic() + 1.0
            stop.wait(_TICK)
    finally:
        for child in children:
            child.stop()


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C interrupts as usual."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def only_one(kit: Kit) -> Iterator[None]:
    """Hold the kit's lock. The kernel lets it go when this process ends, however it ends.

    Raises:
        NetworkError: another process holds it.
    """
    private_folder(kit.run)
    path = kit.run / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = os.read(descriptor, 32).decode(errors="replace").strip()
            raise NetworkError(
                f"this kit runs already{f', as process {pid}' if pid else ''}",
                where=str(kit.path),
                fix="stop that one first; two machines must never run one kit either",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def check_port(host: str, port: int, patience: float = 3.0) -> None:
    """Check that the coordinator could listen; patient, since a predecessor's last connections may still be closing.

    Raises:
        NetworkError: someone else listens there, or this user may not.
    """
    end = time.monotonic() + patience
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((listening_address(host), port))
                return
            except OSError as error:
                reason = error.strerror or str(error)
        if time.monotonic() > end:
            raise NetworkError(
                f"port {port} cannot be listened on: {reason}",
                where="coordinator",
                fix=f"stop what listens there (`ss -lntp sport = :{port}` shows it), or make the network with another "
                "coordinator.port",
            )
        time.sleep(0.2)


def listening_address(host: str) -> str:
    """Where the coordinator of this host name listens: loopback stays on loopback, all else is every interface."""
    loopback = host.rstrip(".").lower() == "localhost" or host.startswith("127.")
    return "127.0.0.1" if loopback else "0.0.0.0"


def _cause(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


@contextlib.contextmanager
def _sink(output: Path | None) -> Iterator[IO[bytes] | None]:
    """The file for a child's output: small, since what matters goes to logs that rotate."""
    if output is None:
        yield None
        return
    if output.exists() and output.stat().st_size > 2**20:
        output.replace(output.with_name(output.name + ".1"))
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as sink:
        yield sink
