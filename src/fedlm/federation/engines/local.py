"""The local engine: simulated silos in this process (`workers=1`) or in worker processes on this machine.

Both give the same bits: a silo's result depends on its request, its private state and the number of torch threads, and
on nothing else. With workers, requests wait in one queue and each free worker takes the next; any worker can serve any
silo, since private states lie on disk.

Failure semantics. A worker that dies (killed, out of memory) is started again and its request is sent again under the
same key, `federation.retries` times: training is deterministic, and if an earlier try had already stored its reply the
silo answers from there. Then it is `Failure(UNREACHABLE)`. A request without a reply at its deadline gives
`Failure(TIMED_OUT)`, its worker is told to stop at the next optimiser step and what it still sends is dropped; a worker
that does not react is killed after a while. A model or data fault while a worker starts is raised from `exchange`,
since no silo can mend it. Closing the engine, from any thread, answers everything that is still asked of its workers,
then and later, with `Failure(UNREACHABLE)`: no exchange waits for a worker that is gone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.lines import spooled
from fedlm.federation.engines.pool import Batch, Job, Setup, Worker, closed
from fedlm.federation.engines.wire import parse_reply, serialized_size, write_spool
from fedlm.federation.silo import POOLED, Silo, Workbench
from fedlm.files import read_tensors
from fedlm.messages import Event, Failure, FailureKind, Observe, Reply, Request, Stop, Tensors
from fedlm.recipe.schema import FederationSpec, Recipe

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData


def resolve_workers(spec: FederationSpec, silos: int, device: str) -> int:
    """Worker processes for `workers: auto`: one per group of `threads` cores, or per GPU; never more than silos."""
    if spec.workers != "auto":
        return min(spec.workers, max(1, silos))
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cuda":
        import torch

        return max(1, min(torch.cuda.device_count(), silos))
    if device == "mps":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // spec.threads, silos))


class LocalEngine:
    """Carries requests to simulated silos.

    Args:
        recipe: what the silos train; the coordinator's requests carry only what differs per round.
        data: all silos' rows (in this process; workers load them again through the same cache).
        run_dir: private states go to `run_dir/silos`, files in flight to `run_dir/spool`.
        workers: 1 for this process, n for n processes.
        threads: torch threads of each.
        observe: receives the silos' progress events, with "run" added.
        base: folder that relative paths of the recipe start from.
        model: whether any request needs the model; without, it is not loaded, and there is one worker.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: FederatedData,
        run_dir: Path,
        *,
        workers: int = 1,
        threads: int | None = None,
        observe: Observe | None = None,
        base: Path = Path(),
        model: bool = True,
    ) -> None:
        if threads is not None and threads != recipe.federation.threads:
            recipe = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"threads": threads})})
        self._data = data
        self._states, self._spool = run_dir / "silos", run_dir / "spool"
        self._logs = run_dir / "logs"
        with disk_errors(run_dir):
            self._states.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._spool.mkdir(exist_ok=True)
        self._observe = observe
        assert model or workers == 1
        self._needs_model = model
        self._bench = Workbench(recipe, data) if workers == 1 else None
        self._count = workers
        self._numbers = itertools.count()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._setup = Setup(recipe, base, self._spool, self._states, self._logs, self._queue, self._tell)
        self._names: frozenset[str] | None = None
        self._pool: list[Worker] = []
        self._closed = False
        self._lock = threading.Lock()
        """Guards starting, closing, and the order of requests before the end of the queue."""

    def silos(self) -> Sequence[str]:
        return self._data.names

    @property
    def workers(self) -> list[int]:
        """Process ids of the live workers (none with `workers=1`)."""
        return [w.pid for w in self._pool if w.pid is not None]

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        """See `fedlm.messages.Engine`. Closing the iterator early cancels what has not been answered.

        Raises:
            FedlmError: the model or the data cannot be loaded.
        """
        self.start()
        until = None if deadline is None else time.monotonic() + deadline
        stop = stop or Stop()
        return self._serial(requests, until, stop) if self._bench else self._parallel(requests, until, stop)

    def start(self) -> None:
        """Load the model here, or start the workers and wait until each is ready.

        Raises:
            FedlmError: the model or the data cannot be loaded.
        """
        if self._bench:
            if self._needs_model:
                self._bench.load()
            return
        with self._lock:
            if self._pool or self._closed:
                return
            with disk_errors(self._logs):
                self._logs.mkdir(exist_ok=True)
            pool = [Worker(self._setup, index) for index in range(self._count)]
            try:
                for worker in pool:
                    worker.spawn()
                for worker in pool:
                    worker.wait_ready()
            except BaseException:
                for worker in pool:
                    worker.kill()
                raise
            self._pool = pool
            for worker in pool:
                worker.thread.start()

    def close(self) -> None:
        """Stop the workers, for good. Replies on their way are lost, and their exchanges end with failures."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, []
        for _ in pool:
            self._queue.put(None)
        for worker in pool:
            worker.kill()
        for worker in pool:
            worker.thread.join(timeout=10)
        with contextlib.suppress(queue.Empty):
            while True:
                if (job := self._queue.get_nowait()) is not None:
                    job.batch.answers.put((job, closed(job.request)))
        for file in [*self._spool.glob("broadcast-*"), *self._spool.glob("reply-*")]:
            file.unlink(missing_ok=True)

    # ---------------------------------------------------------------- in this process

    def _serial(self, requests: Iterable[Request], until: float | None, stop: Stop) -> Iterator[Reply | Failure]:
        assert self._bench is not None

        def over() -> bool:
            return stop.called or _past(until)

        sizes: dict[int, int] = {}
        last: Tensors | None = None
        for request in requests:
            if over():
                yield timed_out(request.silo)
                continue
            if request.tensors is not last:
                last, sizes = request.tensors, {}
            if id(request.tensors) not in sizes:
                sizes[id(request.tensors)] = serialized_size(request.tensors)
            silo = Silo(
                request.silo,
                self._bench,
                self._states,
                observe=partial(self._tell, run=request.run),
                should_stop=over,
            )
            answer = self._unknown(request) or silo.handle(request)
            if over():
                yield timed_out(request.silo)
            elif isinstance(answer, Reply):
                yield measured(answer, sizes[id(request.tensors)], serialized_size(answer.tensors))
            else:
                yield answer

    # ---------------------------------------------------------------- in worker processes

    def _parallel(self, requests: Iterable[Request], until: float | None, stop: Stop) -> Iterator[Reply | Failure]:
        batch = Batch()
        stop.then(lambda: batch.answers.put(None))
        open_jobs: dict[int, Job] = {}
        files: dict[int, tuple[Tensors, str, int]] = {}
        try:
            for request in requests:
                if (failure := self._unknown(request)) is not None:
                    yield failure
                    continue
                name, size = self._broadcast(request.tensors, files)
                job = Job(next(self._numbers), request, batch, name, size)
                open_jobs[job.number] = job
                with self._lock:
                    if self._closed:
                        batch.answers.put((job, closed(request)))
                    else:
                        self._queue.put(job)
            while open_jobs:
                try:
                    wait = None if until is None else max(0.0, until - time.monotonic())
                    arrived = batch.answers.get(timeout=wait)
                except queue.Empty:
                    break
                if arrived is None:
                    break
                job, answer = arrived
                del open_jobs[job.number]
                if isinstance(answer, BaseException):
                    raise answer
                yield self._fetch(job, answer)
            for job in open_jobs.values():
                yield timed_out(job.request.silo)
        finally:
            batch.closed = time.monotonic()
            for worker in self._pool:
                worker.cancel_if(batch)
            while open_jobs:
                # Replies that came too late leave no file behind; those still to come are dropped by their worker.
                try:
                    arrived = batch.answers.get_nowait()
                except queue.Empty:
                    break
                if arrived is not None:
                    self._setup.drop(arrived[1])
            for _, file, _ in files.values():
                (self._spool / file).unlink(missing_ok=True)

    def _broadcast(self, tensors: Tensors, files: dict[int, tuple[Tensors, str, int]]) -> tuple[str | None, int]:
        """Write the tensors once, however many silos receive them."""
        if not tensors:
            return None, 0
        if id(tensors) not in files:
            name = f"broadcast-{os.getpid()}-{next(self._numbers)}.safetensors"
            path = self._spool / name
            with disk_errors(path):
                write_spool(path, tensors)
            files[id(tensors)] = (tensors, name, path.stat().st_size)
        _, name, size = files[id(tensors)]
        return name, size

    def _fetch(self, job: Job, message: Any) -> Reply | Failure:
        if isinstance(message, Failure):
            return message
        if message["type"] == "failure" or message["tensors"] is None:
            answer = parse_reply(message, job.request, {})
            return answer if isinstance(answer, Failure) else measured(answer, job.size, 0)
        path = spooled(self._spool, message["tensors"])
        size = path.stat().st_size
        answer = parse_reply(message, job.request, read_tensors(path))
        path.unlink()
        assert isinstance(answer, Reply)
        return measured(answer, job.size, size)

    def _unknown(self, request: Request) -> Failure | None:
        if request.silo == POOLED or request.silo in self._known():
            return None
        return Failure(request.silo, FailureKind.UNREACHABLE, "there is no silo of this name")

    def _known(self) -> frozenset[str]:
        if self._names is None:
            self._names = frozenset(self._data.names)
        return self._names

    def _tell(self, event: Event, run: str) -> None:
        if self._observe:
            self._observe({**event, "run": run})


def _past(until: float | None) -> bool:
    return until is not None and time.monotonic() >= until


def timed_out(silo: str) -> Failure:
    """The answer to a request whose reply comes too late."""
    return Failure(silo, FailureKind.TIMED_OUT, "no reply within the round's deadline")


def measured(reply: Reply, received: int, sent: int) -> Reply:
    """The reply with the bytes that its silo received and sent."""
    fields = {**reply.fields, "received_bytes": received, "sent_bytes": sent}
    return Reply(reply.silo, reply.verb, reply.run, reply.round, reply.attempt, reply.tensors, fields)
