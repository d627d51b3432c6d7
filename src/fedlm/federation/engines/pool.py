"""Worker processes of the local engine, seen from the engine's side: start, feed, cancel, restart."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fedlm.errors
from fedlm.errors import FedlmError, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.lines import ClosedError, Lines, spooled
from fedlm.federation.engines.nursery import Process, start_worker
from fedlm.federation.engines.wire import request_message
from fedlm.messages import Event, Failure, FailureKind, Request
from fedlm.recipe.schema import Recipe

DEAF_SECONDS = 60.0
"""A worker that does not react to a cancellation for this long is killed and started again."""


@dataclass
class Job:
    number: int
    request: Request
    batch: Batch
    tensors_file: str | None
    size: int
    """Bytes of the request's tensors."""


@dataclass
class Batch:
    """One call of `exchange`."""

    answers: queue.SimpleQueue[tuple[Job, Any] | None] = field(default_factory=queue.SimpleQueue)
    """None: the caller was told to stop waiting."""
    closed: float | None = None
    """When the caller stopped waiting."""


@dataclass(frozen=True)
class Setup:
    """What all workers of an engine share."""

    recipe: Recipe
    base: Path
    spool: Path
    states: Path
    logs: Path
    jobs: queue.SimpleQueue[Job | None]
    tell: Callable[[Event, str], None]

    def drop(self, answer: Any) -> None:
        """Forget an answer that nobody waits for, with its file."""
        if isinstance(answer, dict) and answer.get("tensors"):
            spooled(self.spool, answer["tensors"]).unlink(missing_ok=True)


def own_gpu(index: int) -> dict[str, str]:
    """Environment that shows a worker one GPU of several: worker i gets the (i modulo their number)-th."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return {}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": visible[index % count] if visible else str(index % count)}


def fault(message: Mapping[str, Any]) -> FedlmError:
    """The error that a worker met, from its fields `error` (the type's name), `what`, `where` and `fix`."""
    kind = getattr(fedlm.errors, message["error"], FedlmError)
    if not (isinstance(kind, type) and issubclass(kind, FedlmError)) or kind is fedlm.errors.MissingExtra:
        kind = FedlmError  # MissingExtra writes its own sentence
    return kind(message["what"], where=message["where"], fix=message["fix"])


def closed(request: Request) -> Failure:
    """The answer to a request that no worker will take any more."""
    return Failure(request.silo, FailureKind.UNREACHABLE, "the engine was closed")


class Worker:
    """One worker process and the thread that feeds it from the engine's queue."""

    def __init__(self, setup: Setup, index: int) -> None:
        self._setup, self._index = setup, index
        self._process: Process | None = None
        self._lines: Lines | None = None
        self._current: Job | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self.thread = threading.Thread(target=self._serve, name=f"fedlm-worker-{index}", daemon=True)

    @property
    def _log(self) -> Path:
        return self._setup.logs / f"worker-{self._index}.log"

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def spawn(self) -> None:
        setup = self._setup
        ours, theirs = socket.socketpair()
        with theirs, disk_errors(self._log), self._log.open("ab") as output:
            threads = setup.recipe.federation.threads
            self._process = start_worker(theirs, output, own_gpu(self._index), threads)
        lines = Lines(ours)
        with self._lock:
            self._lines = lines
        with contextlib.suppress(ClosedError):
            lines.send(
                {
                    "type": "start",
                    "recipe": setup.recipe.model_dump(mode="json"),
                    "base": str(setup.base.resolve()),
                    "spool": str(setup.spool.resolve()),
                    "states": str(setup.states.resolve()),
                }
            )

    def wait_ready(self) -> None:
        """Raises:
        FedlmError: what the worker says is wrong with the model or the data, or that it died while starting.
        """
        try:
            message = self._open_lines().receive()
        except ClosedError:
            raise RunError(
                f"a worker process ended while starting ({self._how_it_ended()})", fix=f"see {self._log}"
            ) from None
        assert message is not None
        if message["type"] == "fatal":
            raise fault(message)

    def _open_lines(self) -> Lines:
        """Raises:
        ClosedError: `kill`, from another thread, was first.
        """
        with self._lock:
            if self._lines is None:
                raise ClosedError
            return self._lines

    def cancel_if(self, batch: Batch) -> None:
        """Ask the worker to stop if it works for this batch."""
        with self._lock:
            job, lines = self._current, self._lines
        if job is not None and job.batch is batch and lines is not None:
            with contextlib.suppress(ClosedError):
                lines.send({"type": "cancel", "job": job.number})

    def kill(self) -> None:
        self._stopped = True
        self._end()

    def _serve(self) -> None:
        while (job := self._setup.jobs.get()) is not None:
            if job.batch.closed is not None:
                continue
            with self._lock:
                self._current = job
            answer = self._answer(job)
            with self._lock:
                self._current = None
            if job.batch.closed is not None:
                self._setup.drop(answer)
            else:
                job.batch.answers.put((job, answer))

    def _answer(self, job: Job) -> Any:
        ended = ""
        for _ in range(1 + self._setup.recipe.federation.retries):
            if self._stopped:
                break
            try:
                if self._lines is None:
                    self.spawn()
                    if self._stopped:  # closed while the process started: `kill` may not have seen it
                        self._end()
                        break
                    self.wait_ready()
                return self._ask(job)
            except ClosedError:
                ended = self._how_it_ended()
                self._end()
            except Exception as error:
                self._end()
                if not self._stopped:
                    return error
            if job.batch.closed is not None:
                break
        if self._stopped:
            return closed(job.request)
        return Failure(job.request.silo, FailureKind.UNREACHABLE, f"its worker process died each time ({ended})")

    def _ask(self, job: Job) -> Any:
        lines = self._open_lines()
        lines.send(request_message(job.number, job.request, job.tensors_file))
        if job.batch.closed is not None:
            self.cancel_if(job.batch)
        while True:
            message = lines.receive(timeout=1.0)
            if message is None:
                if job.batch.closed is not None and time.monotonic() - job.batch.closed > DEAF_SECONDS:
                    raise ClosedError
            elif message["type"] == "event":
                if message["job"] == job.number and job.batch.closed is None:
                    self._setup.tell(message["event"], job.request.run)
            elif message["type"] in ("reply", "failure") and message["job"] == job.number:
                return message
            else:
                raise ClosedError

    def _how_it_ended(self) -> str:
        if self._process is None:
            return "not started"
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it stopped answering"
        if code < 0:
            hint = ", perhaps out of memory" if code == -9 else ""
            return f"signal {-code}{hint}"
        return f"exit code {code}"

    def _end(self) -> None:
        with self._lock:
            lines, self._lines = self._lines, None
            process = self._process
        if process is not None and process.poll() is None:
            process.kill()
        if process is not None:
            process.wait()
        if lines is not None:
            lines.close()
