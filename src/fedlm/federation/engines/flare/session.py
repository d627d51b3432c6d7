"""One run's use of a network: its requests on their way to the silos, and the answers on their way back.

Tensors lie in files of the run's spool on both sides of the network and travel in parts, one at a time per silo, so
that memory depends neither on the size of an update nor on the number of silos; at most `WINDOW` fetched updates wait
for the run to take them.

Failure semantics. A silo out of reach is tried again until `reconnect` seconds have passed without one good exchange;
then its request is UNREACHABLE. A silo's relay that has forgotten a request is asked again under the same identity. A
run's process that vanishes leaves the silos working: their answers are kept by the silos themselves, for the process
that continues the run. One that closes in order cancels what is still asked.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import fedlm
from fedlm.errors import FedlmError
from fedlm.federation.engines.flare.asked import MAX_EVENTS
from fedlm.federation.engines.flare.envelope import INLINE, PROTOCOL, BadMessageError, Header, pack, unpack
from fedlm.federation.engines.flare.parts import Incoming, NoRoomError, TransferError, read_part
from fedlm.federation.engines.lines import ClosedError, Lines, Message, spooled
from fedlm.messages import FailureKind

WINDOW = 4
"""Updates that were fetched and not yet taken by the run."""

THREADS = 256
"""Requests under way at once; further ones wait their turn."""

LONGEST_REASON = 1000
"""Characters of a silo's reason for a failure."""

GROWTH, SMALLEST_BOUND = 8, 64 * 2**20
"""An update may have this many times the bytes of what was sent out, or the other number of bytes if that is more: fp64
instead of bf16, and as much again of a rule's own. A silo that announces more would be given the disk."""

HOLD = 10.0
"""Seconds that a silo may hold back the answer to `wait`."""

WORD_SECONDS, PART_SECONDS = 15.0, 60.0
"""Patience for the answer to a short message, and to one that carries a part in either direction."""


class UnreachableError(Exception):
    """A message had no answer; one sentence."""


class OtherVersionError(Exception):
    """A silo's relay speaks another protocol; one sentence that names both versions."""


class Network(Protocol):
    """What the relay needs of the network; thread-safe."""

    def send(self, silo: str, message: bytes, timeout: float) -> bytes:
        """One message to a silo's relay and its answer. Raises UnreachableError."""
        ...

    def connected(self) -> dict[str, float]:
        """Silos that are connected now, and how many seconds ago each was heard."""
        ...

    def revoked(self) -> list[str]: ...

    def revoke(self, silo: str, restore: bool) -> None:
        """Refuse a silo from now on, or accept it again. Raises FedlmError."""
        ...


class _Job:
    """A request of the run, on its way."""

    def __init__(self, message: Message) -> None:
        self.number = int(message["job"])
        self.silo = str(message["silo"])
        self.identity = str(message["id"])
        self.request = {k: message[k] for k in ("silo", "verb", "run", "round", "attempt", "fields")}
        self.retries, self.reconnect = int(message["retries"]), float(message["reconnect"])
        self.tensors: Header | None = message["tensors"]
        """{"name", "sha256", "size"} of the file in the spool."""
        self.cancelled = threading.Event()
        self.abandoned = False
        """Whether the run's process vanished: the silo may go on for the one that continues the run."""
        self.up = self.down = 0
        """Bytes from and to the silo, headers included."""
        self.heard = time.monotonic()
        self.told = 0


class Session:
    """One run's use of the network."""

    def __init__(self, network: Network, lines: Lines, run: str, spool: Path, who: str) -> None:
        self._network, self._lines, self.run, self._spool, self.who = network, lines, run, spool, who
        self._jobs: dict[int, _Job] = {}
        self._lock = threading.Lock()
        self._window = threading.Semaphore(WINDOW)
        self._holding: set[int] = set()
        """Jobs whose update lies in the spool, not yet taken."""
        self._waiting: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = 0
        self._free = 0
        """Threads less the requests that wait or are carried; below 0 only when there are `THREADS` of them."""
        self._ended = False

    @property
    def open(self) -> int:
        """Requests under way."""
        return len(self._jobs)

    def serve(self) -> None:
        """Until the run's process leaves."""
        orderly = False  # a process that was killed may come back for what the silos are doing
        try:
            while True:
                message = self._lines.receive()
                assert message is not None
                if message["type"] == "request":
                    if int(message["job"]) not in self._jobs:  # it was sent while the run connected anew: twice
                        self._begin(_Job(message))
                elif message["type"] == "cancel":
                    if (job := self._jobs.get(int(message["job"]))) is not None:
                        job.cancelled.set()
                    self._release(int(message["job"]))
                elif message["type"] == "taken":
                    self._release(int(message["job"]))
                elif message["type"] == "close":
                    orderly = True
                    return
        except ClosedError:
            return
        finally:
            self._ended = True
            for job in list(self._jobs.values()):
                job.abandoned = not orderly
                job.cancelled.set()
            for number in list(self._holding):
                self._release(number)
            for _ in range(self._threads):
                self._waiting.put(None)

    def _begin(self, job: _Job) -> None:
        self._jobs[job.number] = job
        with self._lock:
            self._free -= 1
            if self._free < 0 and self._threads < THREADS:
                self._threads += 1
                self._free += 1
                threading.Thread(target=self._work, name="fedlm-carrier", daemon=True).start()
        self._waiting.put(job)

    def _work(self) -> None:
        while True:
            job = self._waiting.get()
            if job is None or self._ended:
                return
            try:
                answer = self._carry(job)
            except Exception as error:
                answer = _failure(FailureKind.ERROR, f"the relay failed ({type(error).__name__})")
                print(f"fedlm relay: {type(error).__name__} while carrying {job.request['verb']}", flush=True)
            finally:
                self._jobs.pop(job.number, None)
            with self._lock:
                self._free += 1
            if answer is not None:
                with contextlib.suppress(ClosedError):
                    self._tell(job, answer)

    def _tell(self, job: _Job, answer: Message) -> None:
        """Give the run an answer. Raises ClosedError when its process is gone."""
        more = {"job": job.number, "traffic": {"received_bytes": job.down, "sent_bytes": job.up}}
        try:
            self._lines.send({**answer, **more})
        except (ClosedError, FedlmError, RecursionError) as error:
            if answer.get("tensors"):  # nobody else knows this file
                spooled(self._spool, answer["tensors"]).unlink(missing_ok=True)
                self._release(job.number)
            if isinstance(error, ClosedError):
                raise
            self._lines.send({**_failure(FailureKind.ERROR, "its answer is too long"), **more})

    # ---------------------------------------------------------------- one request

    def _carry(self, job: _Job) -> Message | None:
        """The answer to a request, or None when nobody waits for it any more."""
        job.heard = time.monotonic()
        pause = 0.1
        while not job.cancelled.is_set():
            before = job.heard
            try:
                if (answer := self._attempt(job)) is not None:
                    return answer
            except UnreachableError as error:
                if job.heard > before:
                    pause = 0.1
                if time.monotonic() - job.heard > job.reconnect:
                    return _failure(FailureKind.UNREACHABLE, str(error))
            except OtherVersionError as error:
                return _failure(FailureKind.VERSION_MISMATCH, str(error))
            except (BadMessageError, KeyError, TypeError, ValueError):
                return _failure(FailureKind.ERROR, "the silo's relay does not keep to the protocol")
            except NoRoomError as error:  # no fault of the silo's: the run is to stop
                return {**_failure(FailureKind.ERROR, str(error)), "spool_fault": True}
            except TransferError as error:
                return _failure(FailureKind.ERROR, f"fetching the update failed: {error}")
            except OSError as error:
                # A run that gives a request up says so, and removes what was sent for it, in this order.
                if not job.cancelled.wait(1.0):
                    failure = _failure(FailureKind.ERROR, f"the run's spool cannot be used ({error.strerror})")
                    return {**failure, "spool_fault": True}
                break
            job.cancelled.wait(pause)
            pause = min(2.0, 2 * pause)
        if not job.abandoned:
            with contextlib.suppress(UnreachableError, BadMessageError):
                self._say(job, {"op": "cancel"})
        return None

    def _attempt(self, job: _Job) -> Message | None:
        """Ask, wait, fetch. Raises UnreachableError when a message had no answer, or the silo forgot the request."""
        reply, body = self._ask(job), memoryview(b"")
        while reply["state"] == "running":
            if job.cancelled.is_set():
                return None
            reply, body = self._say(job, {"op": "wait", "told": job.told, "seconds": HOLD}, hold=HOLD)
            if reply["state"] == "unknown":
                job.told = 0
                raise UnreachableError("its relay was started anew")
            for event in reply["events"][:MAX_EVENTS]:
                with contextlib.suppress(ClosedError):
                    self._lines.send({"type": "event", "job": job.number, "event": event})
            job.told = int(reply["told"])
        if reply["state"] != "done":
            raise BadMessageError
        answer = _checked(reply["answer"])
        if int(reply["size"]):
            answer["tensors"] = self._fetch(job, str(reply["sha256"]), int(reply["size"]), body)
            if answer["tensors"] is None:
                return None
        else:
            answer["tensors"] = None
        with contextlib.suppress(UnreachableError, BadMessageError):
            self._say(job, {"op": "drop"})
        return answer

    def _ask(self, job: _Job) -> Header:
        """Hand the request over with its tensors, from where the last try broke off."""
        file = spooled(self._spool, str(job.tensors["name"])) if job.tensors else None
        head: Header = {"op": "ask", "request": job.request, "retries": job.retries, "patience": job.reconnect}
        head["tensors"] = {k: job.tensors[k] for k in ("sha256", "size")} if job.tensors else None
        # Only what is small goes along at once: a repeat asks first what is held already.
        small = file is not None and job.tensors is not None and int(job.tensors["size"]) <= INLINE
        reply, _ = self._say(job, head, read_part(file, 0) if file is not None and small else b"")
        while reply["state"] == "receiving" and file is not None:
            if job.cancelled.is_set():
                raise UnreachableError("cancelled")
            offset = int(reply["held"])
            reply, _ = self._say(job, {"op": "put", "offset": offset}, read_part(file, offset))
            if reply["state"] == "unknown":
                raise UnreachableError("its relay was started anew")
        return reply

    def _fetch(self, job: _Job, digest: str, size: int, body: memoryview) -> str | None:
        """The bare name of the update's file in the spool, or None when the request was cancelled meanwhile."""
        most = max(SMALLEST_BOUND, GROWTH * int(job.tensors["size"]) if job.tensors else 0)
        if size > most:
            raise TransferError(f"its {size} bytes are larger than the {most} that what was sent allows")
        while not self._window.acquire(timeout=0.5):
            if job.cancelled.is_set():
                return None
        with self._lock:
            self._holding.add(job.number)
        if job.cancelled.is_set():  # the run gave it up before it was held, and will not say so again
            self._release(job.number)
            return None
        incoming: Incoming | None = None
        try:
            folder = self._spool / f"incoming-{job.identity}"
            folder.mkdir(exist_ok=True)
            incoming = Incoming(folder, digest, size)
            incoming.add(0, body)
            while not incoming.complete:
                if job.cancelled.is_set():
                    raise UnreachableError("cancelled")
                reply, body = self._say(job, {"op": "get", "offset": incoming.held})
                if reply["state"] != "done":
                    raise UnreachableError("its relay was started anew")
                if not len(body):
                    raise TransferError("the silo's file is shorter than announced")
                incoming.add(incoming.held, body)
            name = f"reply-{job.identity}.safetensors"
            incoming.path.replace(self._spool / name)
            return name
        except BaseException:
            self._release(job.number)
            raise
        finally:
            if incoming is not None:
                incoming.discard()
            with contextlib.suppress(OSError):
                for leftover in (self._spool / f"incoming-{job.identity}").iterdir():
                    leftover.unlink()
                (self._spool / f"incoming-{job.identity}").rmdir()

    def _release(self, number: int) -> None:
        """The run has taken an update, or does not want it: another may be fetched."""
        with self._lock:
            held = number in self._holding
            self._holding.discard(number)
        if held:
            self._window.release()

    def _say(
        self, job: _Job, header: Header, body: bytes | memoryview = b"", hold: float = 0.0
    ) -> tuple[Header, memoryview]:
        message = pack({**header, "id": job.identity}, body)
        patience = PART_SECONDS if header["op"] in ("put", "get") else WORD_SECONDS + hold
        answer = self._network.send(job.silo, message, patience)
        job.heard = time.monotonic()
        job.down += len(message)
        job.up += len(answer)
        reply, body = unpack(answer)
        if reply.get("protocol") != PROTOCOL or reply.get("error") == "protocol":
            theirs = "".join(c for c in str(reply.get("fedlm", "another version")) if c.isprintable())[:40]
            raise OtherVersionError(
                f"its relay is of fedlm {theirs} (protocol {reply.get('protocol')!r:.20}), "
                f"the coordinator's of {fedlm.__version__} (protocol {PROTOCOL})"
            )
        if "error" in reply:
            raise BadMessageError(str(reply["error"]))
        return reply, body


def _checked(answer: Any) -> Message:
    """A silo's answer, without anything that an answer does not have. Raises BadMessageError, ValueError, KeyError."""
    if answer["type"] == "failure":
        reason = "".join(c for c in str(answer["reason"]) if c.isprintable())  # it is shown on a terminal
        return _failure(FailureKind(answer["kind"]), reason[:LONGEST_REASON])
    if answer["type"] != "reply" or not isinstance(answer["fields"], dict):
        raise BadMessageError
    return {"type": "reply", "fields": answer["fields"]}


def _failure(kind: FailureKind, reason: str) -> Message:
    return {"type": "failure", "kind": kind.value, "reason": reason}
