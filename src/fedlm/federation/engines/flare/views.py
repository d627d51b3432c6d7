"""What a supervisor tells of its party: who is connected, since when nobody is, and whether two run one kit."""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from pathlib import Path
from typing import Any

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.ask import status_of
from fedlm.federation.engines.flare.kit import Kit

log = logging.getLogger("fedlm.network")

_EVICTED = re.compile(r"is evicted for \S+ from endpoint ([A-Za-z0-9_-]+)")
_EVICTIONS, _WITHIN_SECONDS, _SILENT_SECONDS = 3, 90.0, 600.0


class Twins:
    """Notices a silo whose connection is replaced again and again: NVFlare lets the latest of two connections win, so
    two machines with one kit take it from each other for ever. NVFlare tells only its log.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._offset = _size(file)
        self._seen: dict[str, deque[float]] = {}
        self._told: dict[str, float] = {}

    def look(self, now: float | None = None) -> list[str]:
        """Silos to warn of: at most once in ten minutes each."""
        now = time.monotonic() if now is None else now
        twins = []
        for name in self._evicted():
            times = self._seen.setdefault(name, deque(maxlen=_EVICTIONS))
            times.append(now)
            often = len(times) == _EVICTIONS and now - times[0] < _WITHIN_SECONDS
            if often and now - self._told.get(name, -_SILENT_SECONDS) >= _SILENT_SECONDS:
                self._told[name] = now
                twins.append(name)
        return twins

    def _evicted(self) -> list[str]:
        size = _size(self._file)
        if size < self._offset:  # the log was put aside, and a new one begun
            self._offset = 0
        if size == self._offset:
            return []
        with self._file.open("rb") as handle:
            handle.seek(self._offset)
            text = handle.read(2**20)
        self._offset += len(text)
        return _EVICTED.findall(text.decode(errors="replace"))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


class CoordinatorView:
    """Says when the coordinator listens, and which silos come and go."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._listens = False
        self._there: dict[str, bool] = {}
        self._twins = Twins(kit.logs / "nvflare.log")

    def watch(self) -> None:
        status = _status(self._kit)
        if status is None:
            self._listens = False
            return
        silos = {name: bool(s.get("connected")) for name, s in status.get("silos", {}).items()}
        if not self._listens:
            self._listens = True
            log.info(
                "coordinator of %s listens on %s:%d; %d silos enrolled",
                self._kit.network,
                self._kit.host,
                self._kit.port,
                len(silos),
            )
        for name, connected in silos.items():
            if connected != self._there.get(name, False):
                log.info("%s is %s", name, "connected" if connected else "no longer connected", extra={"silo": name})
        self._there = silos
        for name in self._twins.look():
            log.warning(
                "%s connects from two places again and again: two machines seem to run its kit, or its network "
                "breaks every few seconds",
                name,
                extra={"silo": name},
            )


class SiloView:
    """Says when the silo is connected and its worker ready, and when that ends."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._told: dict[str, bool | None] = {"connected": None, "worker": None}
        self._waiting_since: float | None = time.monotonic()
        self.status: dict[str, Any] = {}

    def watch(self) -> None:
        self.status = _status(self._kit) or {}
        where = f"{self._kit.network} at {self._kit.host}:{self._kit.port}"
        self._tell("connected", f"connected to {where}", f"lost {where}, trying to reach it again")
        self._tell("worker", "the worker is ready", "the worker is gone")
        if self.status.get("connected"):
            self._waiting_since = None
        elif self._waiting_since is None:
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > 10.0:
            self._waiting_since = time.monotonic() + 50.0  # a reminder each minute
            log.warning("not connected to %s; `fedlm doctor --network %s` looks for the reason", where, self._kit.path)

    def _tell(self, what: str, good: str, bad: str) -> None:
        now = bool(self.status.get(what))
        if now:
            if not self._told[what]:
                log.info(good)
            self._told[what] = True
        elif self._told[what]:
            log.warning(bad)
            self._told[what] = False


def _status(kit: Kit) -> dict[str, Any] | None:
    """The relay's answer, or None while nobody answers: it is starting, or busy for a moment."""
    try:
        return status_of(kit, timeout=2.0)
    except NetworkError:
        return None
