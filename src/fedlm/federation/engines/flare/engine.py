"""The network engine: the same rounds as in simulation, with silos that are organisations.

This is the run's end of the coordinator's relay (`coordinator_relay`): requests leave over a Unix socket as JSON, with
their tensors in a safetensors file of the run's spool, written once however many silos receive it.

Failure semantics. A silo that cannot be reached, a worker that dies, a policy that refuses: each is a typed failure of
that silo, and the round goes on by quorum. A silo that comes back is simply asked again in the next round. When the
coordinator's relay is started anew, everything still asked is asked again under the same identity, so no silo works
twice and no update counts twice. A request without a reply at its deadline gives `Failure(TIMED_OUT)`, its silo is told
to stop, and what it still sends is dropped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fedlm
from fedlm.errors import NetworkError, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.flare.checks import sign
from fedlm.federation.engines.flare.kit import Kit, read_kit, socket_path
from fedlm.federation.engines.lazy import FileTensors, checked_tensors
from fedlm.federation.engines.lines import ClosedError, Lines, Message, spooled
from fedlm.federation.engines.wire import parse_reply, write_spool
from fedlm.federation.figures import LARGEST
from fedlm.messages import Event, Failure, FailureKind, Fields, Observe, Reply, Request, Stop, Tensors
from fedlm.privacy.secagg.identity import CertificateDirectory, Directory
from fedlm.recipe.schema import Recipe

log = logging.getLogger("fedlm.federation")

LARGE = 64 * 2**20
"""Bytes of an update from which on it stays a file, read tensor by tensor: memory would grow with it otherwise."""

PROGRESS = {
    "silo_started": ("round", "verb"),
    "step": ("round", "step", "steps", "loss", "tokens_per_second"),
}
"""What a silo may tell of its progress: kinds of events, and what each must hold."""


@dataclass
class _Job:
    """One request that was sent and not answered."""

    number: int
    request: Request
    answers: _Answers
    message: Message


_Answers = queue.SimpleQueue[tuple[_Job, Message] | None]
"""What came for one exchange; None: its caller was told to stop waiting."""

_TOO_LATE = "no reply within the round's deadline"


class FlareEngine:
    """Carries requests to the silos of a network.

    Args:
        recipe: what the silos are asked to train; it travels with `hello`, and each silo's owner may refuse it.
        kit: the coordinator's kit.
        run: the run's name, shown to whoever finds the network in use.
        run_dir: files in flight go to `run_dir/spool`.
        observe: receives the silos' progress events, with "run" added.
        model: whether the silos need the model; without, its fingerprint is not told.

    Raises:
        NetworkError: no coordinator's kit, its relay does not answer, another run is using it, or this kit's operator
            may not run federations.
    """

    def __init__(
        self, recipe: Recipe, kit: Path, run: str, run_dir: Path, *, observe: Observe | None = None, model: bool = True
    ) -> None:
        self._recipe, self._run, self._observe, self._needs_model = recipe, run, observe, model
        self._kit: Kit = read_kit(kit, "coordinator")
        self._spool = run_dir / "spool"
        with disk_errors(run_dir):
            self._spool.mkdir(parents=True, exist_ok=True)
            for file in [*self._spool.glob("broadcast-*"), *self._spool.glob("reply-*")]:
                file.unlink()  # of a process that was killed
        self._nonce = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._jobs: dict[int, _Job] = {}
        self._lock = threading.Lock()
        """Guards the open jobs, the link, and what is closed."""
        self._closed = False
        self._hello: Fields | None = None
        self._lines: Lines | None = None
        self._lines, self._names = self._connect()
        threading.Thread(target=self._listen, name="fedlm-network", daemon=True).start()

    @property
    def directory(self) -> Directory:
        """What this party knows of the silos' identities: the root that their certificates are issued by."""
        return CertificateDirectory(self._kit.root_certificate.read_bytes())

    def silos(self) -> Sequence[str]:
        return self._names

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        """See `fedlm.messages.Engine`. Closing the iterator early cancels what has not been answered.

        Raises:
            RunError: the disk of the run directory is full.
            FedlmError: the coordinator's own model cannot be loaded (to compare it with the silos').
        """
        until = None if deadline is None else time.monotonic() + deadline
        return self._exchange(requests, until, stop or Stop())

    def close(self) -> None:
        """Leave the network. What is still asked is cancelled at the silos and answered as unreachable."""
        with self._lock:
            self._closed = True
            lines, jobs, self._jobs = self._lines, list(self._jobs.values()), {}
        if lines is not None:
            with contextlib.suppress(ClosedError):  # the relay may be gone already
                lines.send({"type": "close"})
            lines.close()
        for job in jobs:
            job.answers.put((job, _unreachable("the engine was closed")))

    # ---------------------------------------------------------------- exchanges

    def _exchange(self, requests: Iterable[Request], until: float | None, stop: Stop) -> Iterator[Reply | Failure]:
        answers: _Answers = queue.SimpleQueue()
        stop.then(lambda: answers.put(None))
        open_jobs: dict[int, _Job] = {}
        files: dict[int, tuple[Tensors, Message]] = {}
        try:
            for request in requests:
                if request.silo not in self._names:
                    yield Failure(request.silo, FailureKind.UNREACHABLE, "there is no silo of this name")
                    continue
                if stop.called:  # nothing begins that nobody waits for
                    yield Failure(request.silo, FailureKind.TIMED_OUT, _TOO_LATE)
                    continue
                job = self._send(request, answers, self._broadcast(request.tensors, files))
                open_jobs[job.number] = job
            while open_jobs:
                try:
                    wait = None if until is None else max(0.0, until - time.monotonic())
                    arrived = answers.get(timeout=wait)
                except queue.Empty:
                    break
                if arrived is None:
                    break
                job, message = arrived
                del open_jobs[job.number]
                yield self._receive(job, message)
            for job in open_jobs.values():
                yield Failure(job.request.silo, FailureKind.TIMED_OUT, _TOO_LATE)
        finally:
            for job in open_jobs.values():
                self._abandon(job)
            while not answers.empty():  # came too late: their files go
                late = answers.get()
                if late is not None and late[1].get("tensors"):
                    spooled(self._spool, late[1]["tensors"]).unlink(missing_ok=True)
            for _, described in files.values():
                (self._spool / described["name"]).unlink(missing_ok=True)

    def _broadcast(self, tensors: Tensors, files: dict[int, tuple[Tensors, Message]]) -> Message | None:
        """Write the tensors once, however many silos receive them; name, size and digest of the file."""
        if not tensors:
            return None
        if id(tensors) not in files:
            name = f"broadcast-{os.getpid()}-{next(self._numbers)}.safetensors"
            path = self._spool / name
            with disk_errors(path):
                write_spool(path, tensors)
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[id(tensors)] = (tensors, {"name": name, "size": path.stat().st_size, "sha256": digest})
        return files[id(tensors)][1]

    def _send(self, request: Request, answers: _Answers, tensors: Message | None) -> _Job:
        if request.verb == "hello":
            request = replace(request, fields={**request.fields, **self._introduction()})
        number = next(self._numbers)
        message = {
            "type": "request",
            "job": number,
            "id": f"{self._nonce}-{number}",
            "silo": request.silo,
            "verb": request.verb,
            "run": request.run,
            "round": request.round,
            "attempt": request.attempt,
            "fields": request.fields,
            "tensors": tensors,
            "retries": self._recipe.federation.retries,
            "reconnect": self._recipe.federation.reconnect,
        }
        job = _Job(number, request, answers, message)
        with self._lock:
            if self._closed:
                answers.put((job, _unreachable("the engine was closed")))
                return job
            self._jobs[number] = job
        self._tell_relay(message)
        return job

    def _introduction(self) -> Fields:
        """What a silo must know to agree to a run: versions, the recipe, and which weights are meant."""
        if self._hello is None:
            from fedlm.models.fingerprint import fingerprint

            self._hello = {
                "fedlm": fedlm.__version__,
                "schema": self._recipe.schema_version,
                "recipe": self._recipe.model_dump(mode="json"),
                **({"model": fingerprint(self._recipe.model)} if self._needs_model else {}),
            }
        return self._hello

    def _receive(self, job: _Job, message: Message) -> Reply | Failure:
        """The answer, with its tensors read from the spool.

        Raises:
            RunError: the relay has no room for the answer here.
        """
        if message.get("spool_fault"):
            raise RunError(
                f"an update of {job.request.silo} cannot be received: {message['reason']}",
                where=str(self._spool),
                fix="make room, then continue with --resume; the last finished round is intact",
            )
        if message["type"] == "failure" or not message.get("tensors"):
            answer = parse_reply(message, job.request, {})
        else:
            path = spooled(self._spool, str(message["tensors"]))
            try:
                if path.stat().st_size > LARGE:
                    answer = parse_reply(message, job.request, FileTensors(path))
                else:
                    answer = parse_reply(message, job.request, checked_tensors(path))
                    path.unlink()
            except Exception:  # whatever the library makes of bytes that a silo chose
                answer = Failure(job.request.silo, FailureKind.BAD_UPDATE, "the update is no safetensors file")
                path.unlink(missing_ok=True)
            self._tell_relay({"type": "taken", "job": job.number})
        if isinstance(answer, Failure):
            return answer
        return replace(answer, fields={**answer.fields, **message["traffic"]})

    def _abandon(self, job: _Job) -> None:
        with self._lock:
            self._jobs.pop(job.number, None)
        self._tell_relay({"type": "cancel", "job": job.number})

    def _tell_relay(self, message: Message) -> None:
        lines = self._lines
        if lines is not None:
            try:
                lines.send(message)
            except ClosedError:
                return  # the listening thread sees the same end, connects anew and asks everything open again

    # ---------------------------------------------------------------- the link to the relay

    def _connect(self) -> tuple[Lines, list[str]]:
        """Introduce this run to the relay.

        Raises:
            NetworkError: nobody listens, or the relay refuses.
        """
        path = socket_path(self._kit.path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            raise NetworkError(
                f"the coordinator's relay does not answer ({error.strerror})",
                where=str(self._kit.path),
                fix=f"start it: fedlm coordinator start {self._kit.path}",
            ) from None
        lines = Lines(connection)
        try:
            lines.send({"type": "open", "run": self._run, "spool": str(self._spool.resolve())})
            challenge = lines.receive(timeout=30.0) or {}
            nonce = bytes.fromhex(str(challenge["nonce"]))
            operator = self._kit.operator
            lines.send(
                {
                    "type": "proof",
                    "certificate": (operator / "client.crt").read_text(),
                    "signature": sign(operator / "client.key", nonce).hex(),
                }
            )
            answer = lines.receive(timeout=30.0) or {}
        except (ClosedError, KeyError, ValueError):
            lines.close()
            raise NetworkError("the coordinator's relay ended the conversation", where=str(self._kit.path)) from None
        except OSError as error:
            lines.close()
            raise NetworkError(
                f"the operator's certificate cannot be read ({error.strerror})",
                where=str(self._kit.operator),
                fix="run this with the coordinator's complete kit, as the user who owns it",
            ) from None
        if answer.get("type") != "opened":
            lines.close()
            raise NetworkError(
                str(answer.get("what", "the coordinator's relay refused")),
                where=str(self._kit.path),
                fix=answer.get("fix"),
            )
        return lines, sorted(map(str, answer["silos"]))

    def _listen(self) -> None:
        """Hear the relay until the engine is closed; connect anew when the relay is started anew."""
        while not self._closed:
            assert self._lines is not None
            try:
                while (message := self._lines.receive()) is not None:
                    self._hear(message)
            except ClosedError:
                if self._closed or not self._reconnect():
                    break
            except Exception as error:  # such as an observer that fell over: nobody would hear the silos any more
                log.exception("the run no longer hears its silos")
                reason = f"the run's engine failed ({type(error).__name__})"
                self._give_up({"type": "failure", "kind": FailureKind.ERROR.value, "reason": reason})
        if self._lines is not None:
            self._lines.close()  # the engine was closed while it was being connected anew

    def _hear(self, message: Message) -> None:
        with self._lock:
            job = self._jobs.get(int(message["job"]))
            if job is not None and message["type"] in ("reply", "failure"):
                del self._jobs[job.number]
                job.answers.put((job, message))  # under the lock: an exchange that ends finds it, or it comes too late
                return
        if job is None:  # nobody waits for it any more
            if message.get("tensors"):
                spooled(self._spool, str(message["tensors"])).unlink(missing_ok=True)
        elif self._observe and (event := progress(message["event"])) is not None:
            self._observe({**event, "silo": job.request.silo, "run": job.request.run})

    def _reconnect(self) -> bool:
        """Come back to the relay and ask again what is open; False when it stays away, or the engine was closed."""
        until = time.monotonic() + self._recipe.federation.reconnect
        reason = "the coordinator's relay is gone"
        while time.monotonic() < until and not self._closed:
            try:
                self._lines, _ = self._connect()
            except NetworkError as error:
                reason = error.what
                time.sleep(0.5)
                continue
            with self._lock:
                again = [job.message for job in self._jobs.values()]
            for message in again:
                self._tell_relay(message)
            return True
        self._give_up(_unreachable(reason))
        return False

    def _give_up(self, answer: Message) -> None:
        """Give this answer to everything that is open, and begin nothing more."""
        with self._lock:
            self._closed = True
            jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            job.answers.put((job, answer))


def progress(event: Any) -> Event | None:
    """A silo's progress event, if it is one: a silo may be faulty or lie, and displays must not fall over it."""
    wanted = PROGRESS.get(str(event.get("kind"))) if isinstance(event, dict) else None
    if wanted is None:
        return None
    found: Event = {"kind": event["kind"]}
    for name in wanted:
        value = event.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST
        if not (value in ("train", "evaluate") if name == "verb" else number):  # NaN is below nothing
            return None
        found[name] = value
    return found


def _unreachable(reason: str) -> Message:
    return {"type": "failure", "kind": FailureKind.UNREACHABLE.value, "reason": reason}
