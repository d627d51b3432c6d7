"""The coordinator's relay: who may use the network, what `fedlm network status` shows, and the one run at a time.

It lives in the process that the silos are connected to, imports no torch, and listens on a Unix socket, whose other end
is `engine.FlareEngine`. What it carries for a run is in `session`.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fedlm.errors import FedlmError
from fedlm.federation.engines.flare.checks import may_run, verify
from fedlm.federation.engines.flare.envelope import BadMessageError, pack, unpack
from fedlm.federation.engines.flare.session import Network, Session, UnreachableError
from fedlm.federation.engines.lines import ClosedError, Lines, Message

MAX_STATUS = 256 * 2**10
"""Bytes of what a silo says of itself."""

LONGEST_WORD, LARGEST = 200, 2**53
"""Of a word in it, and of a number."""


class CoordinatorRelay:
    """The relay of one network.

    Args:
        name: the network's name.
        silos: names enrolled.
        network: carries messages.
        listener: a listening Unix socket for runs and visitors.
        root: the consortium's root certificate (PEM): operators' certificates are checked against it.
    """

    def __init__(
        self, name: str, silos: Callable[[], list[str]], network: Network, listener: socket.socket, root: bytes
    ) -> None:
        self.name, self._silos, self._network, self._listener, self._root = name, silos, network, listener, root
        self._lock = threading.Lock()
        self._session: Session | None = None
        threading.Thread(target=self._accept, name="fedlm-relay-accept", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            lines = Lines(connection)
            threading.Thread(target=self._visitor, args=[lines], name="fedlm-relay-visitor", daemon=True).start()

    def _visitor(self, lines: Lines) -> None:
        try:
            first = lines.receive(timeout=30.0)
            if first is None:
                return
            if first.get("type") == "status":
                lines.send(self.status())
            elif first.get("type") in ("revoke", "restore"):
                self._change(lines, first)
            elif first.get("type") == "open":
                self._open(lines, first)
            else:
                lines.send({"type": "error", "reason": "unknown request"})
        except ClosedError:
            pass  # a visitor that left: nothing to tell it
        finally:
            lines.close()

    def _change(self, lines: Lines, first: Message) -> None:
        try:
            self._network.revoke(str(first.get("silo")), restore=first["type"] == "restore")
            lines.send({"type": "ok"})
        except FedlmError as error:
            lines.send({"type": "error", "reason": error.sentence()})

    def _open(self, lines: Lines, first: Message) -> None:
        """Serve one run until its process leaves."""
        nonce = secrets.token_bytes(32)
        lines.send({"type": "challenge", "nonce": nonce.hex()})
        proof = lines.receive(timeout=30.0) or {}
        try:
            certificate = str(proof["certificate"]).encode()
            who = may_run(certificate, self._root)
            verify(certificate, nonce, bytes.fromhex(str(proof["signature"])))
        except FedlmError as error:
            lines.send({"type": "refused", "what": error.what, "fix": error.fix})
            return
        except (KeyError, ValueError):
            lines.send({"type": "refused", "what": "this is no proof of who runs the federation", "fix": None})
            return
        session = Session(self._network, lines, str(first["run"]), Path(str(first["spool"])), who)
        with self._lock:
            if self._session is not None:
                other = self._session
                lines.send(
                    {
                        "type": "refused",
                        "what": f"this network is in use by the run {other.run} of {other.who}",
                        "fix": "wait until it has ended, or stop it",
                    }
                )
                return
            self._session = session
        try:
            lines.send({"type": "opened", "network": self.name, "silos": self._enrolled()})
            session.serve()
        finally:
            with self._lock:
                self._session = None

    def _enrolled(self) -> list[str]:
        revoked = set(self._network.revoked())
        return sorted(name for name in self._silos() if name not in revoked)

    def status(self) -> dict[str, Any]:
        """What `fedlm network status` shows."""
        seen, revoked = self._network.connected(), set(self._network.revoked())
        names = sorted({*self._silos(), *seen})
        with ThreadPoolExecutor(max_workers=max(1, min(32, len(names)))) as pool:
            answers = list(pool.map(lambda n: self._ask_status(n) if n in seen else {}, names))
        silos = {}
        for name, answer in zip(names, answers, strict=True):
            known = {k: answer.get(k) for k in ("fedlm", "versions", "clock_skew", "free_memory", "card", "busy")}
            silos[name] = {
                "connected": name in seen,
                "last_seen": seen.get(name),
                "worker": bool(answer.get("worker")),
                "revoked": name in revoked,
                **known,
            }
        with self._lock:
            session = self._session
        run = {"run": session.run, "operator": session.who, "open": session.open} if session is not None else None
        return {"type": "status", "network": self.name, "silos": silos, "run": run}

    def _ask_status(self, silo: str) -> dict[str, Any]:
        began = time.time()
        try:
            message = self._network.send(silo, pack({"op": "status"}), 5.0)
            answer = unpack(message)[0] if len(message) <= MAX_STATUS else {}
        except (UnreachableError, BadMessageError):
            return {}
        answer = {str(name): _shown(value) for name, value in answer.items()}
        if isinstance(clock := answer.get("clock"), float):
            answer["clock_skew"] = clock - (began + time.time()) / 2
        if not isinstance(answer.get("free_memory"), int):
            answer["free_memory"] = None
        return answer


def _shown(value: Any, depth: int = 4) -> Any:
    """What a silo says of itself, fit for a terminal: a silo may be faulty or lie."""
    if isinstance(value, str):
        return "".join(c for c in value[:LONGEST_WORD] if c.isprintable())
    if isinstance(value, int | float):
        return value if abs(value) < LARGEST else None  # NaN is below nothing
    if isinstance(value, dict) and depth:
        return {_shown(str(name)): _shown(part, depth - 1) for name, part in value.items()}
    return None
