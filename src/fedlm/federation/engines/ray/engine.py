"""The Ray engine: simulated silos over a cluster's CPUs and GPUs, or over this machine's.

For simulation only. Ray pickles what it moves between its processes, and whoever may talk to a Ray cluster may run any
code on it: one trusted cluster, never a way between organisations.

A pool of actors holds one base model each (mapped from the model's file, so the actors of a machine share its pages).
Any actor serves any silo, since private states lie in the run directory: on a cluster of several machines it must be
on a file system that all of them share, under the same path, and an actor that cannot see it refuses to start. A
round's tensors are put into Ray's object store once, and replies wait there, not in the coordinator's memory, until
they are asked for. An actor has one request at a time: another would wait in vain while a neighbour is free. Results
are those of the local engine, bit for bit, on machines of the same kind.

Failure semantics are the local engine's too (see there). An actor that dies is replaced and its request goes, under
the same key, to whoever is free first, `federation.retries` times; then it is `Failure(UNREACHABLE)`, or
`Failure(OUT_OF_MEMORY)` where Ray ended it to save its machine's memory.
"""

from __future__ import annotations

import itertools
import os
import queue
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlm.errors import FedlmError
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.local import measured, timed_out
from fedlm.federation.engines.pool import closed, fault
from fedlm.federation.engines.ray.actor import Packed, pack, unpack, versions
from fedlm.federation.engines.ray.cluster import Cluster, Share, join, nodes, require, share_out
from fedlm.federation.engines.ray.pump import Batch, Job, Pump, Seat
from fedlm.federation.engines.wire import serialized_size
from fedlm.federation.silo import POOLED
from fedlm.messages import Event, Failure, FailureKind, Observe, Reply, Request, Stop, Tensors
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData

PLACE_SECONDS = 180.0
"""How long all workers may take to get their place on the cluster."""

INHERITED = ("FEDLM_CACHE", "HF_HOME", "HF_HUB_OFFLINE")
"""Settings of this process that workers on other machines get too; never secrets, which Ray would log."""


class RayEngine:
    """Carries requests to simulated silos over Ray.

    Args:
        recipe: what the silos train. `federation.workers` counts actors; 'auto' is one per GPU of the cluster, or per
            group of `federation.threads` cores. More actors than GPUs share them in equal fractions.
        data: all silos' rows (in this process; actors load them again through their machine's cache).
        run_dir: private states go to `run_dir/silos`.
        address: HOST:PORT of a running cluster, 'auto' for the one this machine belongs to; None starts Ray here.
        most: never more actors than this; by default the number of silos.
        observe: receives the silos' progress events, with "run" added.
        base: folder that relative paths of the recipe start from.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: FederatedData,
        run_dir: Path,
        *,
        address: str | None = None,
        most: int | None = None,
        observe: Observe | None = None,
        base: Path = Path(),
    ) -> None:
        self._recipe, self._data, self._base = recipe, data, base.resolve()
        self._address, self._most = address, len(data.names) if most is None else most
        self._states, self._logs = run_dir.resolve() / "silos", run_dir / "logs"
        with disk_errors(run_dir):
            self._states.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._observe = observe
        self._known = frozenset([*data.names, POOLED])
        self._numbers = itertools.count()
        self._cluster: Cluster | None = None
        self._share = Share(0, 0, 0.0)
        self._pump: Pump | None = None
        self._closed = False
        self._lock = threading.Lock()
        """Guards starting, closing, and the order of requests before the end of the pump."""

    def silos(self) -> Sequence[str]:
        return self._data.names

    @property
    def workers(self) -> list[int]:
        """Process ids of the actors that are ready, each on its own machine."""
        return self._pump.pids if self._pump else []

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        """See `fedlm.messages.Engine`. Closing the iterator early cancels what has not been answered.

        Raises:
            MissingExtra: Ray is not installed.
            FedlmError: the cluster cannot be reached, has no room, or its machines do not fit this one; or the model or
                the data cannot be loaded.
        """
        self.start()
        return self._answers(requests, None if deadline is None else time.monotonic() + deadline, stop or Stop())

    def start(self) -> None:
        """Start Ray or connect to it, place the actors and wait until each has its model.

        Raises:
            FedlmError: see `exchange`.
        """
        with self._lock:
            if self._pump is not None or self._closed:
                return
            with disk_errors(self._logs):
                self._logs.mkdir(exist_ok=True)
            self._cluster = join(self._address, self._logs / "ray.log")
            seats: list[Seat] = []
            try:
                self._share = share_out(self._recipe.federation, self._recipe.model.device, self._most, nodes())
                local = self._cluster.folder is not None
                seats = [Seat(self._actor(), local) for _ in range(self._share.workers)]
                self._place(seats)
                self._load(seats)
            except BaseException:
                for seat in seats:
                    seat.kill()
                self._cluster.leave()
                raise
            self._pump = Pump(seats, self._recipe.federation.retries, self._actor, self._loading, self._tell)
            self._pump.start()

    def close(self) -> None:
        """End the actors, and Ray if it was started here. Replies on their way are lost; exchanges end in failures."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            pump, cluster = self._pump, self._cluster
        if pump is not None:
            pump.stop()
            assert cluster is not None
            cluster.leave()

    # ---------------------------------------------------------------- actors

    def _actor(self) -> Any:
        """A new actor, not yet placed."""
        from fedlm.federation.engines.ray.actor import SiloWorker

        threads = str(self._recipe.federation.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        environment |= {name: os.environ[name] for name in INHERITED if name in os.environ}
        # Ray would start a dead actor again by itself; the pump does it, to know whose request it died of.
        actor = require().remote(concurrency_groups={"control": 1})(SiloWorker)
        return actor.options(
            num_cpus=self._share.cpus,
            num_gpus=self._share.gpus,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        ).remote()

    def _loading(self, actor: Any) -> Any:
        """Ask an actor to load model and data; a reference to None or to the fields of an error."""
        return actor.load.remote(self._recipe.model_dump(mode="json"), str(self._base), str(self._states))

    def _place(self, seats: list[Seat]) -> None:
        """Wait until every actor has its place, and see that their machines fit.

        Raises:
            FedlmError: no room, another fedlm, torch or Python there, or no sight of the run directory.
        """
        import ray

        mark = f"seen-by-workers-{secrets.token_hex(8)}"
        file = self._states / f".{mark}"
        with disk_errors(file):
            file.write_text(mark)
        try:
            greetings = [seat.actor.greet.remote(str(self._states), mark) for seat in seats]
            placed, missing = ray.wait(greetings, num_returns=len(greetings), timeout=PLACE_SECONDS)
            try:
                facts = ray.get(placed)
            except ray.exceptions.RayError as error:
                raise FedlmError(
                    f"a worker cannot start on the cluster ({_cause(error)})",
                    fix="install the same fedlm, with the same dependencies, on all of its machines",
                ) from error
        finally:
            file.unlink(missing_ok=True)
        if missing:
            raise FedlmError(
                f"the cluster has room for {len(placed)} of {len(seats)} workers of {self._share.cpus} CPUs and "
                f"{self._share.gpus} GPUs each",
                where="federation.workers",
                fix=f"set it to {max(1, len(placed))}, or wait until the cluster is free",
            )
        here = versions()
        for seat, fact in zip(seats, facts, strict=True):
            seat.pid = fact["pid"]
            for name, theirs in fact["versions"].items():
                if theirs != here[name]:
                    raise FedlmError(
                        f"the cluster's machine {fact['node']} has {name} {theirs}, this one {here[name]}",
                        fix="install the same versions on all of them: others give other bits",
                    )
            if not fact["sees"]:
                raise FedlmError(
                    f"the cluster's machine {fact['node']} does not see the run directory",
                    where=str(self._states.parent),
                    fix="put it on a file system that all machines share under the same path, with --run-dir",
                )

    def _load(self, seats: list[Seat]) -> None:
        """Raises:
        FedlmError: what an actor says is wrong with the model or the data, or that it died.
        """
        import ray

        try:
            for problem in ray.get([self._loading(seat.actor) for seat in seats]):
                if problem is not None:
                    raise fault(problem)
        except ray.exceptions.RayError as error:
            raise FedlmError(
                f"a worker ended while it loaded the model ({_cause(error)})",
                where=str(self._logs / "ray.log"),
                fix="see there; with too little memory, lower federation.workers",
            ) from error

    # ---------------------------------------------------------------- exchanges

    def _answers(self, requests: Iterable[Request], until: float | None, stop: Stop) -> Iterator[Reply | Failure]:
        batch = Batch()
        stop.then(lambda: batch.answers.put(None))
        open_jobs: dict[int, Job] = {}
        broadcasts: dict[int, tuple[Tensors, Any, int]] = {}
        try:
            for request in requests:
                if request.silo not in self._known:
                    yield Failure(request.silo, FailureKind.UNREACHABLE, "there is no silo of this name")
                    continue
                reference, size = self._broadcast(request.tensors, broadcasts)
                job = Job(next(self._numbers), request, batch, reference, size)
                open_jobs[job.number] = job
                self._submit(job)
            while open_jobs:
                try:
                    wait = None if until is None else max(0.0, until - time.monotonic())
                    arrived = batch.answers.get(timeout=wait)
                except queue.Empty:
                    break
                if arrived is None:
                    break
                job, answer = arrived
                if job.number not in open_jobs:
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                reply = self._fetch(job, answer, until)
                if reply is None:
                    continue
                del open_jobs[job.number]
                yield reply
            for job in open_jobs.values():
                yield timed_out(job.request.silo)
        finally:
            batch.closed = time.monotonic()
            if open_jobs and self._pump is not None:
                self._pump.cancel(batch)

    def _broadcast(self, tensors: Tensors, known: dict[int, tuple[Tensors, Any, int]]) -> tuple[Any, int]:
        """Put the tensors once, however many silos receive them; a machine fetches them once, for all its actors."""
        import ray

        if id(tensors) not in known:
            try:
                known[id(tensors)] = tensors, ray.put(pack(tensors)), serialized_size(tensors)
            except Exception:
                if not self._closed:
                    raise
                return None, 0  # nobody will read them
        _, reference, size = known[id(tensors)]
        return reference, size

    def _submit(self, job: Job) -> None:
        with self._lock:
            if self._closed or self._pump is None:
                job.answer(closed(job.request))
            else:
                self._pump.submit(job)

    def _fetch(self, job: Job, answer: Any, until: float | None) -> Reply | Failure | None:
        """The reply with its tensors, which are read where they lie; None when it was lost and is asked for again."""
        import ray

        if isinstance(answer, Failure):
            return answer
        fields, reference = answer
        if "failure" in fields:
            return Failure(job.request.silo, FailureKind(fields["failure"]), fields["reason"])
        try:
            packed: Packed = ray.get(reference, timeout=None if until is None else max(0.0, until - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            return timed_out(job.request.silo)
        except Exception as error:
            if self._closed:
                return closed(job.request)
            if not isinstance(error, ray.exceptions.RayError):
                raise
            # Its machine is gone. The silo has stored the reply with its state, so asking again costs little.
            if job.may_try_again(self._recipe.federation.retries):
                self._submit(job)
                return None
            return Failure(job.request.silo, FailureKind.UNREACHABLE, "its reply was lost with its machine")
        request = job.request
        reply = Reply(
            request.silo,
            request.verb,
            request.run,
            request.round,
            request.attempt,
            unpack(packed),
            dict(fields["fields"]),
        )
        return measured(reply, job.size, int(fields["size"]))

    def _tell(self, event: Event, run: str) -> None:
        if self._observe:
            self._observe({**event, "run": run})


def _cause(error: BaseException) -> str:
    """What Ray says in the end; of an exception inside a worker only the type, since its message may hold anything."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return type(cause).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
