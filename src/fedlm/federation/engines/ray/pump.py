"""One thread that feeds the actors of the Ray engine, and replaces those that die.

Everything that happens (a request comes in, a call returned, a caller gave up) is a message to this thread, which
alone changes what is said here of actors and jobs; nothing is polled but progress, five times a second.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fedlm.federation.engines.pool import DEAF_SECONDS, closed, fault
from fedlm.messages import Event, Failure, FailureKind, Request

TICK = 0.2
"""Seconds between two looks at the progress of a request."""


@dataclass
class Batch:
    """One call of `exchange`."""

    answers: queue.SimpleQueue[tuple[Job, Any] | None] = field(default_factory=queue.SimpleQueue)
    """None: the caller was told to stop waiting."""
    closed: float | None = None
    """When the caller stopped waiting."""


@dataclass
class Job:
    """A request on its way."""

    number: int
    request: Request
    batch: Batch
    tensors: Any
    """Reference to the packed tensors in Ray's object store."""
    size: int
    """Bytes of the request's tensors."""
    tries: int = 0

    def answer(self, answer: Any) -> None:
        """Give the caller a failure, an exception to raise, or a reply's fields and the reference to its tensors."""
        if self.batch.closed is None:
            self.batch.answers.put((self, answer))

    def may_try_again(self, retries: int) -> bool:
        """Count a try that came to nothing."""
        self.tries += 1
        return self.tries <= retries and self.batch.closed is None


@dataclass
class Seat:
    """The place of one actor: its successor takes the same."""

    actor: Any
    local: bool = False
    """Whether its process belongs to a Ray that this process started, on this machine."""
    pid: int | None = None
    """Of the actor that is ready; None while a new one loads."""
    job: Job | None = None
    done: Any = None
    """The finished call of the job, while the last look at its progress is still out."""
    reply: Any = None
    """Reference to the tensors of the job's reply."""
    looking: bool = False
    """Whether a look at its progress is out."""
    deaths: int = 0
    """Starts in a row that failed."""
    lost: bool = False
    """No successor could be started."""

    @property
    def free(self) -> bool:
        return self.job is None and self.pid is not None

    def control(self, method: str) -> Any:
        """A method that the actor runs beside its request."""
        return getattr(self.actor, method).options(concurrency_group="control")

    def kill(self) -> None:
        import ray

        if self.local and self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)  # Ray asks the process to end itself, and a frozen one does not
        with contextlib.suppress(Exception):  # already dead, or Ray is
            ray.kill(self.actor, no_restart=True)


class Pump:
    """Feeds the actors.

    Args:
        seats: actors that are ready.
        retries: how often a request is sent again when its actor died.
        new_actor: starts an actor.
        loading: asks an actor to load; a reference to None or to an error's fields.
        tell: receives progress events with their run.
    """

    def __init__(
        self,
        seats: list[Seat],
        retries: int,
        new_actor: Callable[[], Any],
        loading: Callable[[Any], Any],
        tell: Callable[[Event, str], None],
    ) -> None:
        self._seats, self._retries = seats, retries
        self._new_actor, self._loading, self._tell = new_actor, loading, tell
        self._waiting: deque[Job] = deque()
        self._messages: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fedlm-ray", daemon=True)

    @property
    def pids(self) -> list[int]:
        return [seat.pid for seat in self._seats if seat.pid is not None]

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; its answer goes to its batch."""
        self._messages.put(partial(self._take, job))
        if not self._thread.is_alive():
            job.answer(closed(job.request))

    def cancel(self, batch: Batch) -> None:
        """Stop what is done for a batch that nobody waits for."""
        self._messages.put(partial(self._cancel, batch))

    def stop(self) -> None:
        """Answer everything with 'closed' and end the actors."""
        self._messages.put(None)
        self._thread.join(timeout=30)

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        looked = time.monotonic()
        try:
            while True:
                busy = any(seat.job is not None for seat in self._seats)
                try:
                    message = self._messages.get(timeout=TICK if busy else None)
                    if message is None:
                        return
                    message()
                except queue.Empty:
                    pass  # time to look
                self._assign()
                if time.monotonic() - looked >= TICK:
                    self._look()
                    looked = time.monotonic()
        except Exception as error:  # a fault of this file must not leave callers waiting
            self._end(error)
        finally:
            self._end()
            for seat in self._seats:
                seat.kill()
                seat.pid = None

    def _end(self, error: Exception | None = None) -> None:
        for job in [*(seat.job for seat in self._seats if seat.job is not None), *self._waiting]:
            job.answer(error or closed(job.request))
        for seat in self._seats:
            seat.job = None
        self._waiting.clear()

    def _take(self, job: Job) -> None:
        self._waiting.append(job)
        if all(seat.lost for seat in self._seats):
            for seat in self._seats:
                seat.lost, seat.deaths = False, 0
                self._replace(seat)

    def _assign(self) -> None:
        for seat in self._seats:
            while seat.free and self._waiting:
                job = self._waiting.popleft()
                if job.batch.closed is None:
                    self._send(seat, job)

    def _send(self, seat: Seat, job: Job) -> None:
        request = job.request
        head = {name: getattr(request, name) for name in ("silo", "verb", "run", "round", "attempt", "fields")}
        fields, tensors = seat.actor.handle.options(num_returns=2).remote(job.number, head, job.tensors)
        seat.job, seat.reply, seat.done = job, tensors, None
        self._when_done(fields, partial(self._returned, seat, job))

    def _returned(self, seat: Seat, job: Job, call: Any) -> None:
        if seat.job is job:
            seat.done = call
            if not seat.looking:  # else its last events come first
                self._settle(seat)

    def _settle(self, seat: Seat) -> None:
        import ray

        job, call, reply = seat.job, seat.done, seat.reply
        assert job is not None
        seat.job = seat.done = seat.reply = None
        error = call.exception()
        if error is None:
            fields = call.result()
            self._progress(job, fields.pop("events"))
            job.answer((fields, reply))
        elif isinstance(error, ray.exceptions.RayTaskError):
            # Not the silo: it answers whatever happens inside. The message may hold anything: its type is all we say.
            kind = type(getattr(error, "cause", error)).__name__
            job.answer(Failure(job.request.silo, FailureKind.ERROR, f"its worker met an unexpected {kind}"))
        else:
            self._died(seat, job, error)

    def _died(self, seat: Seat, job: Job, error: BaseException) -> None:
        import ray

        self._replace(seat)
        if job.may_try_again(self._retries):
            self._waiting.appendleft(job)
        elif isinstance(error, ray.exceptions.OutOfMemoryError):
            reason = "Ray ended its worker each time to save memory; lower federation.workers or the batch"
            job.answer(Failure(job.request.silo, FailureKind.OUT_OF_MEMORY, reason))
        else:
            reason = f"its worker process died each time ({type(error).__name__})"
            job.answer(Failure(job.request.silo, FailureKind.UNREACHABLE, reason))

    # ---------------------------------------------------------------- new actors

    def _replace(self, seat: Seat) -> None:
        seat.kill()
        seat.pid, seat.looking = None, False
        seat.actor = self._new_actor()
        greeting = seat.actor.greet.remote("", "")
        loaded = self._loading(seat.actor)
        self._when_done(loaded, partial(self._loaded, seat, seat.actor, greeting))

    def _loaded(self, seat: Seat, actor: Any, greeting: Any, call: Any) -> None:
        import ray

        if seat.actor is not actor:
            return
        try:
            problem = call.result()
            if problem is None:
                seat.pid, seat.deaths = ray.get(greeting)["pid"], 0
                return
            for job in self._waiting:  # no silo can mend what is wrong with the model or the data
                job.answer(fault(problem))
            self._waiting.clear()
            seat.lost = True
        except ray.exceptions.RayError as error:
            seat.deaths += 1
            if seat.deaths <= self._retries:
                self._replace(seat)
                return
            seat.lost = True
            if all(s.lost for s in self._seats):
                reason = f"no worker could be started again ({type(error).__name__})"
                for job in self._waiting:
                    job.answer(Failure(job.request.silo, FailureKind.UNREACHABLE, reason))
                self._waiting.clear()

    # ---------------------------------------------------------------- progress and cancellation

    def _look(self) -> None:
        """Fetch the progress of what is under way; end actors that do not react to a cancellation."""
        now = time.monotonic()
        for seat in self._seats:
            job = seat.job
            if job is None or seat.done is not None:
                continue
            if job.batch.closed is not None:
                if now - job.batch.closed > DEAF_SECONDS:
                    seat.job = seat.reply = None
                    self._replace(seat)
            elif not seat.looking:
                seat.looking = True
                self._when_done(seat.control("events").remote(), partial(self._looked, seat, seat.actor, job))

    def _looked(self, seat: Seat, actor: Any, job: Job, call: Any) -> None:
        if seat.actor is not actor:
            return
        seat.looking = False
        if call.exception() is None:
            self._progress(job, call.result())
        if seat.job is not None and seat.done is not None:
            self._settle(seat)

    def _progress(self, job: Job, events: list[Event]) -> None:
        if job.batch.closed is None:
            for event in events:
                self._tell(event, job.request.run)

    def _cancel(self, batch: Batch) -> None:
        self._waiting = deque(job for job in self._waiting if job.batch is not batch)
        for seat in self._seats:
            if seat.job is not None and seat.job.batch is batch:
                seat.control("cancel").remote(seat.job.number)

    def _when_done(self, reference: Any, then: Callable[[Any], None]) -> None:
        """Call `then` with the finished call, in this thread."""
        reference.future().add_done_callback(lambda call: self._messages.put(partial(then, call)))
