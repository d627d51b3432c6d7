"""Worker processes that start from one which has imported the libraries already.

Importing torch and transformers takes seconds of processor time in each process and hundreds of megabytes. On Linux
without a GPU, worker processes are forked from a nursery: a process that has imported them and done nothing else, with
one thread. It is started with the first worker and ends with this process, or after a while without workers.
Elsewhere (a GPU's driver and macOS' libraries do not survive a fork) each worker is started from nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

from fedlm.errors import RunError
from fedlm.federation.engines.lines import ClosedError, Lines, readable

PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal that a process gets when its parent ends

WORKER = "fedlm.federation.engines.worker"
NURSERY = "fedlm.federation.engines.nursery"


class Process(Protocol):
    """What the engine needs of a worker process; `subprocess.Popen` has it."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def start_worker(connection: socket.socket, output: IO[bytes], environment: dict[str, str], threads: int) -> Process:
    """Start a process that runs `fedlm.federation.engines.worker` on one end of a socket pair.

    Args:
        connection: the worker's end; the caller closes its copy.
        output: receives what the process prints.
        environment: of the process, beside this one's.
        threads: of the mathematics libraries.

    Raises:
        RunError: it cannot be started.
    """
    number = str(threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": number,
        "MKL_NUM_THREADS": number,
        "TOKENIZERS_PARALLELISM": "false",
        **environment,
    }
    if forks():
        return _nursery.start(connection, output, environment)
    # A session of its own: Ctrl-C reaches the coordinator alone, which then stops the workers in order.
    return subprocess.Popen(
        [sys.executable, "-m", WORKER, str(connection.fileno())],
        pass_fds=[connection.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        env=environment,
        start_new_session=True,
    )


def forks() -> bool:
    """Whether a process that has imported torch may be forked here."""
    import torch

    return sys.platform == "linux" and not torch.cuda.is_available()


class Forked:
    """A worker process that the nursery forked, seen from the process that asked for it.

    Args:
        lifeline: carries the exit code once the process has ended; closing it, or any byte, ends the process.
    """

    def __init__(self, pid: int, lifeline: socket.socket) -> None:
        self.pid = pid
        self._lifeline = lifeline
        self._code: int | None = None
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        with self._lock:
            if self._code is None:
                if timeout is not None and not readable(self._lifeline, timeout):
                    raise subprocess.TimeoutExpired(WORKER, timeout)
                said = b""
                with contextlib.suppress(OSError):
                    said = self._lifeline.recv(64)
                self._lifeline.close()
                # Without a word the nursery itself was killed, and its workers with it.
                self._code = int(said) if said else -signal.SIGKILL
            return self._code

    def kill(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._code is None:
                self._lifeline.send(b"k")


class Nursery:
    """The nursery of this process: started when it is needed, and anew where the environment is another one.

    Args:
        idle: seconds without workers until it ends.
    """

    def __init__(self, idle: float = 30.0) -> None:
        self._idle = idle
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}
        self._owner = 0
        self._lock = threading.Lock()

    def start(self, connection: socket.socket, output: IO[bytes], environment: dict[str, str]) -> Forked:
        with self._lock:
            here = _environment()
            if self._control is not None and (self._owner, self._environment) == (os.getpid(), here):
                with contextlib.suppress(ClosedError):  # it ended, being idle or killed
                    return self._fork(connection, output, environment)
            self._begin(here)
            try:
                return self._fork(connection, output, environment)
            except ClosedError:
                raise RunError(
                    "the process that worker processes are forked from ended while starting",
                    fix="see what it printed; with too little memory, take fewer federation.workers",
                ) from None

    def _begin(self, environment: dict[str, str]) -> None:
        if self._control is not None:
            self._control.close()  # ends when its workers have
        if self._process is not None and self._owner == os.getpid():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=1)
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", NURSERY, str(theirs.fileno()), str(self._idle)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Forked with one thread: those that a mathematics library starts when it is loaded would be missing.
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                start_new_session=True,
            )
        self._owner, self._environment = os.getpid(), environment

    def _fork(self, connection: socket.socket, output: IO[bytes], environment: dict[str, str]) -> Forked:
        """Raises:
        ClosedError: the nursery is gone.
        """
        assert self._control is not None
        lifeline, theirs = socket.socketpair()
        order = {"environment": environment, "folder": str(Path.cwd())}
        try:
            with theirs:
                fds = [connection.fileno(), output.fileno(), theirs.fileno()]
                try:
                    socket.send_fds(self._control, [b"+"], fds)
                except OSError as error:
                    raise ClosedError from error
                lines = Lines(self._control)
                lines.send(order)
                answer = lines.receive()
            assert answer is not None
            return Forked(int(answer["pid"]), lifeline)
        except BaseException:
            lifeline.close()
            raise


def _environment() -> dict[str, str]:
    """What libraries may have read when they were imported."""
    return {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}


_nursery = Nursery()


# ---------------------------------------------------------------- in the nursery


def preload() -> None:
    """Import what every worker needs, and keep the collector from touching it: pages stay shared."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fedlm.data.federated
    import fedlm.federation.engines.worker
    import fedlm.federation.silo.door  # noqa: F401

    gc.collect()
    gc.freeze()


def main() -> None:
    control, idle = socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2])
    preload()
    woken, waker = socket.socketpair()
    for end in (woken, waker):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker.fileno())
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    workers: dict[int, socket.socket] = {}
    listening = True
    while listening or workers:
        ready = selector.select(idle if not workers else None)
        if not ready and not workers:
            return
        for key, _ in ready:
            if key.fileobj is control:
                listening = _hatch(control, woken, waker, selector, workers)
                if not listening:
                    selector.unregister(control)
            elif key.fileobj is woken:
                with contextlib.suppress(BlockingIOError):
                    woken.recv(4096)
                _reap(selector, workers)
            elif key.data in workers:
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)


def _hatch(
    control: socket.socket,
    woken: socket.socket,
    waker: socket.socket,
    selector: selectors.BaseSelector,
    workers: dict[int, socket.socket],
) -> bool:
    """Fork a worker; False when the process that asks for workers is gone."""
    try:
        mark, fds, _, _ = socket.recv_fds(control, 1, 3)
        order = Lines(control).receive() if mark else None
    except (OSError, ClosedError):
        return False
    if order is None:
        return False
    connection, output, lifeline = fds
    pid = os.fork()
    if pid == 0:
        selector.close()
        for end in (control, woken, waker, *workers.values()):
            end.close()
        os.close(lifeline)
        _live(connection, output, order)
    for fd in (connection, output):
        os.close(fd)
    workers[pid] = socket.socket(fileno=lifeline)
    selector.register(workers[pid], selectors.EVENT_READ, pid)
    try:
        Lines(control).send({"pid": pid})
    except ClosedError:  # killed meanwhile; the lifeline's end is seen next
        return False
    return True


def _reap(selector: selectors.BaseSelector, workers: dict[int, socket.socket]) -> None:
    while workers:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        lifeline = workers.pop(pid)
        with contextlib.suppress(KeyError):
            selector.unregister(lifeline)
        with lifeline, contextlib.suppress(OSError):
            lifeline.send(str(os.waitstatus_to_exitcode(status)).encode())


def _live(connection: int, output: int, order: dict[str, Any]) -> NoReturn:
    """In the forked process: be the worker, and end."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for standard in (1, 2):
            os.dup2(output, standard)
        os.close(output)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["folder"])

        from fedlm.federation.engines.worker import work

        work(connection)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
