"""The silo's relay: takes requests from the coordinator's relay, hands them to the silo's worker, keeps the answers.

It lives in the process that holds the connection to the coordinator, apart from the worker that holds text and model,
and imports no torch. Every call from outside is one short message in and one out:

    ask     here is a request; its tensors are this file (the first part may be in the body)
    put     the next part of that file
    wait    has it been answered? (held back until something happens, a few seconds at most; small tensors come along)
    get     a part of the answer's tensors
    drop    the answer has arrived, forget it
    cancel  nobody waits for it any more
    status  how is this silo?

Failure semantics. A worker that dies is waited for, and given the request again, `retries` times; then the answer is
UNREACHABLE. A repeat of any call does no harm: a request that is known is not given to the worker twice, and the worker
itself answers a repeated round from its store. Everything that comes in is bounded: message size, open requests, and a
file of tensors by the free disk.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import fedlm
from fedlm.federation.engines.flare.asked import LONGEST_WORD, MAX_RETRIES, Asked, checked
from fedlm.federation.engines.flare.envelope import INLINE, PROTOCOL, BadMessageError, Header, pack, unpack
from fedlm.federation.engines.flare.parts import Incoming, TransferError, digest_of, read_part
from fedlm.federation.engines.lines import ClosedError, Lines, Message, spooled
from fedlm.messages import FailureKind

MAX_OPEN = 256
"""Requests that a silo holds at once; the oldest is forgotten first."""

KEPT_SECONDS = 3600.0
"""How long an answer waits for a coordinator that does not ask for it: one that was killed never will. The worker keeps
its own answer to a round, so a later question costs no second training."""

LONGEST_WAIT = 20.0
"""Seconds that a `wait` is held back at most."""


class SiloRelay:
    """One silo's relay.

    Args:
        name: the silo.
        spool: folder for tensors on their way, emptied at the start.
        listener: a listening Unix socket; the worker and `fedlm network status` connect to it.
        facts: added to the answer to `status`.
    """

    def __init__(
        self, name: str, spool: Path, listener: socket.socket, facts: Callable[[], dict[str, Any]] | None = None
    ) -> None:
        self.name, self._spool, self._listener, self._facts = name, spool, listener, facts or dict
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(mode=0o700, parents=True)
        self._asked: OrderedDict[str, Asked] = OrderedDict()
        self._files: OrderedDict[str, Incoming] = OrderedDict()
        self._numbers = 0
        self._changed = threading.Condition()
        """Guards everything above and the worker's link."""
        self._worker: Lines | None = None
        self._worker_facts: dict[str, Any] = {}
        self._card: Any = None
        self._calls: dict[str, Callable[[Header, memoryview], bytes]] = {
            "ask": self._ask,
            "put": self._put,
            "wait": self._wait,
            "get": self._get,
            "drop": self._drop,
            "cancel": self._cancel,
            "status": self._status,
        }
        threading.Thread(target=self._accept, name="fedlm-relay-accept", daemon=True).start()
        threading.Thread(target=self._watch, name="fedlm-relay-watch", daemon=True).start()

    # ---------------------------------------------------------------- from the coordinator

    def handle(self, message: bytes) -> bytes:
        """Answer one message; whatever it holds, the answer is a message."""
        try:
            header, body = unpack(message)
            if header.get("protocol") != PROTOCOL:
                return pack({"error": "protocol", "fedlm": fedlm.__version__})
            call = self._calls.get(str(header.get("op")))
            if call is None:
                return pack({"error": "unknown call"})
            return call(header, body)
        except (BadMessageError, KeyError, TypeError, ValueError, OverflowError, RecursionError, OSError) as error:
            return pack({"error": f"malformed message ({type(error).__name__})"})

    def _ask(self, header: Header, body: memoryview) -> bytes:
        identity, request = str(header["id"]), header["request"]
        if len(identity) > LONGEST_WORD:
            raise ValueError("a long name")
        wanted, patience = header["tensors"], float(header["patience"])
        if not isinstance(request, dict) or request["silo"] != self.name:
            return self._refusal("the request names another silo")
        request = checked(request)
        if not math.isfinite(patience):
            raise ValueError("no number of seconds")
        with self._changed:
            asked = self._asked.get(identity)
            if asked is None:
                try:
                    incoming = self._incoming(wanted) if wanted else None
                except TransferError as error:
                    return self._refusal(str(error), FailureKind.ERROR)
                self._numbers += 1
                request = {**request, "type": "request", "job": self._numbers, "tensors": None}
                asked = Asked(self._numbers, request, min(int(header["retries"]), MAX_RETRIES), patience, incoming)
                self._asked[identity] = asked
                while len(self._asked) > MAX_OPEN:
                    self._forget(next(iter(self._asked)))
            asked.heard = time.monotonic()
            return self._receive(asked, 0, body)

    def _put(self, header: Header, body: memoryview) -> bytes:
        with self._changed:
            asked = self._asked.get(str(header["id"]))
            if asked is None or asked.tensors is None:
                return pack({"state": "unknown"})
            asked.heard = time.monotonic()
            return self._receive(asked, int(header["offset"]), body)

    def _receive(self, asked: Asked, offset: int, body: memoryview) -> bytes:
        """Take a part, and give the request to the worker once all of its tensors are here."""
        if asked.tensors is not None and not asked.tensors.complete:
            try:
                asked.tensors.add(offset, body)
            except TransferError as error:
                self._settle(asked, _failure(FailureKind.ERROR, f"receiving the model failed: {error}"))
                return pack({"state": "running"})
            if not asked.tensors.complete:
                return pack({"state": "receiving", "held": asked.tensors.held})
        self._start(asked)
        return pack({"state": "running"})

    def _wait(self, header: Header, body: memoryview) -> bytes:  # noqa: ARG002
        identity, told = str(header["id"]), int(header["told"])
        seconds = float(header["seconds"])
        if not math.isfinite(seconds):
            raise ValueError("no number of seconds")
        until = time.monotonic() + min(seconds, LONGEST_WAIT)
        with self._changed:
            while True:
                asked = self._asked.get(identity)
                if asked is None:
                    return pack({"state": "unknown"})
                asked.heard = time.monotonic()
                if asked.answer is not None or asked.told > told:
                    break
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            fresh = min(asked.told - told, len(asked.events))
            events = list(asked.events)[len(asked.events) - fresh :] if fresh > 0 else []
            reply: Header = {"state": "running", "events": events, "told": asked.told}
            if asked.answer is None:
                return pack(reply)
            reply |= {"state": "done", "answer": asked.answer, "size": asked.size, "sha256": asked.digest}
            file = asked.file
        return pack(reply, read_part(file, 0) if file is not None and asked.size <= INLINE else b"")

    def _get(self, header: Header, body: memoryview) -> bytes:  # noqa: ARG002
        with self._changed:
            asked = self._asked.get(str(header["id"]))
            file = asked.file if asked is not None else None
            if asked is not None:
                asked.heard = time.monotonic()
        if file is None:
            return pack({"state": "unknown"})
        return pack({"state": "done"}, read_part(file, int(header["offset"])))

    def _drop(self, header: Header, body: memoryview) -> bytes:  # noqa: ARG002
        with self._changed:
            self._forget(str(header["id"]))
        return pack({"state": "dropped"})

    def _cancel(self, header: Header, body: memoryview) -> bytes:
        with self._changed:
            asked = self._asked.get(str(header["id"]))
            worker = self._worker if asked is not None and asked.working else None
        if asked is not None and worker is not None:
            with contextlib.suppress(ClosedError):
                worker.send({"type": "cancel", "job": asked.number})
        return self._drop(header, body)

    def _status(self, header: Header, body: memoryview) -> bytes:  # noqa: ARG002
        return pack(self.status())

    def status(self) -> dict[str, Any]:
        """What `fedlm network status` shows of this silo; counts and versions only."""
        with self._changed:
            busy = next((str(a.message["verb"]) for a in self._asked.values() if a.working), None)
            return {
                "type": "status",
                "name": self.name,
                "worker": self._worker is not None,
                "busy": busy,
                "card": self._card,
                "clock": time.time(),
                "free_memory": psutil.virtual_memory().available,
                "free_disk": shutil.disk_usage(self._spool).free,
                **self._worker_facts,
                **self._facts(),
            }

    def _refusal(self, reason: str, kind: FailureKind = FailureKind.REFUSED) -> bytes:
        return pack({"state": "done", "answer": _failure(kind, reason), "size": 0, "events": [], "told": 0})

    # ---------------------------------------------------------------- inside; `_changed` is held

    def _incoming(self, wanted: Header) -> Incoming:
        """The file of these tensors, new or under way; the two used last are kept."""
        digest = str(wanted["sha256"])
        known = self._files.get(digest)
        if known is None or known.size != int(wanted["size"]) or (known.complete and not known.path.exists()):
            known = self._files[digest] = Incoming(self._spool, digest, int(wanted["size"]))
        self._files.move_to_end(digest)
        used = {a.tensors.digest for a in self._asked.values() if a.tensors is not None} | {digest}
        for old in [d for d in self._files if d not in used][:-1]:
            self._files[old].path.unlink(missing_ok=True)
            self._files.pop(old).discard()
        return known

    def _start(self, asked: Asked) -> None:
        if asked.answer is not None or asked.working or self._worker is None:
            return
        if asked.tensors is not None:
            asked.message["tensors"] = asked.tensors.path.name
        asked.working = True
        try:
            self._worker.send(asked.message)
        except ClosedError:
            asked.working = False  # the reading thread sees the same end, and counts it

    def _settle(self, asked: Asked, answer: Message) -> None:
        asked.answer, asked.working = answer, False
        self._changed.notify_all()

    def _forget(self, identity: str) -> None:
        asked = self._asked.pop(identity, None)
        if asked is not None and asked.file is not None:
            asked.file.unlink(missing_ok=True)
        self._changed.notify_all()

    # ---------------------------------------------------------------- the worker and local visitors

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._visitor, args=[Lines(connection)], name="fedlm-relay-visitor", daemon=True
            ).start()

    def _visitor(self, lines: Lines) -> None:
        with contextlib.suppress(ClosedError):
            first = lines.receive(timeout=30.0)
            if first is None:
                pass
            elif first.get("type") == "status":
                lines.send(self.status())
            elif first.get("type") == "worker":
                self._serve_worker(lines, first)
            else:
                lines.send({"type": "error", "reason": "this socket is for the silo's worker and for status"})
        lines.close()

    def _serve_worker(self, lines: Lines, first: Message) -> None:
        """Raises:
        ClosedError: the worker is gone.
        """
        with self._changed:
            if self._worker is not None:
                lines.send({"type": "error", "reason": "another worker already serves this silo"})
                return
            lines.send({"type": "welcome", "spool": str(self._spool.resolve())})
            self._worker, self._worker_facts = lines, dict(first.get("facts") or {})
        try:
            with self._changed:
                for asked in self._asked.values():
                    if asked.tensors is None or asked.tensors.complete:
                        self._start(asked)
            while True:
                message = lines.receive()
                if message is not None:
                    self._hear(message)
        finally:
            with self._changed:
                self._worker, self._worker_facts = None, {}
                for asked in self._asked.values():
                    if asked.working:
                        asked.working, asked.since = False, time.monotonic()
                        asked.deaths += 1
                        if asked.deaths > asked.retries:
                            self._settle(asked, _failure(FailureKind.UNREACHABLE, "its worker process died each time"))

    def _hear(self, message: Message) -> None:
        """An event or an answer from the worker."""
        file, size, digest = None, 0, ""
        if message["type"] == "reply" and message["tensors"] is not None:
            file = spooled(self._spool, str(message["tensors"]))
            size, digest = file.stat().st_size, digest_of(file)
        with self._changed:
            asked = next((a for a in self._asked.values() if a.number == message["job"]), None)
            if asked is None or asked.answer is not None:  # cancelled, or told already
                if file is not None:
                    file.unlink(missing_ok=True)
            elif message["type"] == "event":
                asked.events.append(message["event"])
                asked.told += 1
                self._changed.notify_all()
            else:
                if asked.message["verb"] == "hello" and message["type"] == "reply":
                    self._card = message["fields"].get("card")
                asked.file, asked.size, asked.digest = file, size, digest
                self._settle(asked, message)

    def _watch(self) -> None:
        """Give up requests whose worker does not come back, and answers that nobody asks for any more."""
        while True:
            time.sleep(0.5)
            with self._changed:
                now = time.monotonic()
                for identity in [i for i, a in self._asked.items() if now - a.heard > KEPT_SECONDS and not a.working]:
                    self._forget(identity)
                for asked in self._asked.values():
                    ready = asked.tensors is None or asked.tensors.complete
                    if self._worker is not None or not ready or asked.answer is not None:
                        asked.since = now
                    elif now - asked.since > asked.patience:
                        self._settle(asked, _failure(FailureKind.UNREACHABLE, "its worker process is not running"))


def _failure(kind: FailureKind, reason: str) -> Message:
    return {"type": "failure", "kind": kind.value, "reason": reason}


def listen(path: Path) -> socket.socket:
    """A listening Unix socket that only this user can open; a stale file of a dead process is replaced.

    Raises:
        OSError: the path cannot be used.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(16)
    return listener
