"""A worker process of the local engine: holds the base model and answers requests for any simulated silo.

Started by the engine with one end of a socket pair. It ends when the socket closes, so no worker outlives its engine,
however the engine ends. Anything it prints goes to the run's log of this worker.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from fedlm.errors import FedlmError, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.lines import ClosedError, Lines, Message, spooled
from fedlm.federation.engines.wire import parse_request, reply_message, write_spool
from fedlm.messages import Event, Failure, FailureKind, Observe, Reply, Request, Tensors

Handle = Callable[[Request, Observe, Callable[[], bool]], Reply | Failure]
"""Answers a request; receives where to send progress events, and what says that nobody waits any more."""


class Inbox:
    """Requests in order of arrival; a thread reads them, so that a cancellation or the other side's end is seen.

    Args:
        at_end: called, by the reading thread, when the other side is gone.
    """

    def __init__(self, lines: Lines, at_end: Callable[[], None] = lambda: None) -> None:
        self._lines, self._at_end = lines, at_end
        self._requests: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        threading.Thread(target=self._read, name="fedlm-inbox", daemon=True).start()

    def next(self) -> Message | None:
        """The next request; None when the other side is gone."""
        return self._requests.get()

    def cancelled(self, job: int) -> bool:
        return job in self._cancelled

    def _read(self) -> None:
        try:
            while (message := self._lines.receive()) is not None:
                if message["type"] == "cancel":
                    self._cancelled.add(int(message["job"]))
                else:
                    self._requests.put(message)
        except ClosedError:
            pass
        finally:
            self._at_end()
            self._requests.put(None)


def work(connection: int) -> None:
    """Be a worker on one end of a socket pair, given by its file descriptor, until the other end closes."""
    lines = Lines(socket.socket(fileno=connection))
    start = lines.receive()
    assert start is not None
    # Without its engine nothing here is worth finishing; stored states are written atomically.
    inbox = Inbox(lines, at_end=lambda: os._exit(0))
    try:
        serve(lines, inbox, start)
    except FedlmError as error:
        lines.send(
            {"type": "fatal", "error": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        )
    except ClosedError:
        return


def serve(lines: Lines, inbox: Inbox, start: Message) -> None:
    """Load the model, then answer requests one after another until the engine closes the socket.

    Raises:
        FedlmError: the model or the data cannot be loaded.
    """
    from fedlm.data.federated import load_data
    from fedlm.federation.silo import Silo, Workbench
    from fedlm.recipe.schema import Recipe

    recipe = Recipe.model_validate(start["recipe"])
    spool, states = Path(start["spool"]), Path(start["states"])
    bench = Workbench(recipe, load_data(recipe, Path(start["base"])))
    bench.load()
    lines.send({"type": "ready"})

    def handle(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        return Silo(request.silo, bench, states, observe=observe, should_stop=should_stop).handle(request)

    answer_requests(lines, inbox, spool, handle)


def answer_requests(lines: Lines, inbox: Inbox, spool: Path, handle: Handle) -> None:
    """Answer one request after another, until the other side is gone.

    Raises:
        ClosedError: it is gone, and an answer could not be sent.
    """
    from fedlm.federation.engines.lazy import checked_tensors
    from fedlm.federation.silo.door import classify

    broadcast: tuple[str, Tensors] = ("", {})
    while (message := inbox.next()) is not None:
        job, name = int(message["job"]), message["tensors"]

        def observe(event: Event, job: int = job) -> None:
            lines.send({"type": "event", "job": job, "event": event})

        def should_stop(job: int = job) -> bool:
            return inbox.cancelled(job)

        answer: Reply | Failure
        try:
            # Silos of one round receive the same tensors: the file is read once.
            if name is not None and name != broadcast[0]:
                broadcast = (name, checked_tensors(spooled(spool, name)))
            request = parse_request(message, broadcast[1] if name is not None else {})
        except FileNotFoundError:
            answer = Failure(
                str(message["silo"]), FailureKind.TIMED_OUT, "the coordinator no longer waits for this reply"
            )
        except Exception as error:  # whatever the library makes of bytes and words that the other side chose
            kind, reason = classify(error)
            answer = Failure(str(message["silo"]), kind, f"the request cannot be read: {reason}")
        else:
            answer = handle(request, observe, should_stop)
        file = None
        if isinstance(answer, Reply) and answer.tensors:
            file = f"reply-{os.getpid()}-{job}.safetensors"
            try:
                with disk_errors(spool):
                    write_spool(spooled(spool, file), answer.tensors)
            except FedlmError as error:
                file, answer = None, Failure(answer.silo, FailureKind.ERROR, error.sentence())
        try:
            lines.send(reply_message(job, answer, file))
        except (ClosedError, RunError) as error:
            if file is not None:
                spooled(spool, file).unlink(missing_ok=True)  # nobody else knows of it
            if isinstance(error, ClosedError):
                raise
            lines.send(reply_message(job, Failure(str(message["silo"]), FailureKind.ERROR, error.sentence()), None))


if __name__ == "__main__":
    work(int(sys.argv[1]))
