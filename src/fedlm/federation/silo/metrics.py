"""What a silo's worker tells whoever watches it: requests, seconds, bytes, whether the coordinator is there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fedlm.federation.silo.door import VERBS
from fedlm.messages import FailureKind

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

OK = "ok"

SECONDS = (0.01, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)


class SiloMetrics:
    """Figures of one silo's worker, safe from several threads.

    `health` is for `fedlm.endpoint.serve_metrics`: healthy while the worker has its way to the coordinator.

    Args:
        registry: as `fedlm.endpoint.new_registry` makes it; receives the figures.
        clock: seconds that only grow; for tests.
    """

    def __init__(self, registry: CollectorRegistry, silo: str, clock: Callable[[], float] = time.monotonic) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self._silo, self._clock = silo, clock
        self._lock = threading.Lock()
        self._busy: list[str] = []
        self._is_connected = False
        self._last: float | None = None
        self._requests = Counter(
            "fedlm_silo_requests",
            "Requests by verb and outcome: ok, or the kind of the failure.",
            ("verb", "outcome"),
            registry=registry,
        )
        self._seconds = Histogram(
            "fedlm_silo_request_seconds", "Seconds of work.", ("verb",), buckets=SECONDS, registry=registry
        )
        self._bytes = Counter("fedlm_silo_bytes", "Bytes of requests (in), replies (out).", ("way",), registry=registry)
        self._connected = Gauge("fedlm_silo_connected", "1 while the coordinator can be reached.", registry=registry)
        self._at_work = Gauge("fedlm_silo_busy", "Requests at work now.", registry=registry)
        for verb in sorted(VERBS):
            self._requests.labels(verb, OK)
        for way in ("in", "out"):
            self._bytes.labels(way)

    def began(self, verb: str) -> None:
        """A request has come in; `ended` follows."""
        with self._lock:
            self._busy.append(verb)
            self._at_work.set(len(self._busy))

    def ended(self, verb: str, failure: FailureKind | None, seconds: float, received: int, sent: int) -> None:
        """The request that `began` told of was answered, `failure` says how if not well.

        Args:
            received, sent: bytes of the request and of its reply.
        """
        label = verb if verb in VERBS else "other"  # a coordinator may ask for anything
        with self._lock:
            if verb in self._busy:
                self._busy.remove(verb)
            self._at_work.set(len(self._busy))
            self._last = self._clock()
        self._requests.labels(label, failure.value if failure else OK).inc()
        self._seconds.labels(label).observe(seconds)
        self._bytes.labels("in").inc(received)
        self._bytes.labels("out").inc(sent)

    def connected(self, yes: bool) -> None:
        """Whether the coordinator can be reached now."""
        with self._lock:
            self._is_connected = yes
        self._connected.set(yes)

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the coordinator can be reached, and {"status", "silo", "busy", "seconds_since_request"}."""
        with self._lock:
            status = "disconnected" if not self._is_connected else "busy" if self._busy else "ready"
            since = None if self._last is None else round(self._clock() - self._last, 1)
            busy = self._busy[0] if self._busy and self._busy[0] in VERBS else "other" if self._busy else None
            return self._is_connected, {
                "status": status,
                "silo": self._silo,
                "busy": busy,
                "seconds_since_request": since,
            }
