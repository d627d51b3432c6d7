"""A run's figures for Prometheus and its health check, folded from the events that its observer receives.

Labels have few values: verbs and kinds of failure from fixed lists, and silos' names only up to `SILO_LABELS` silos.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fedlm.endpoint import new_registry, serve_metrics
from fedlm.messages import Event, FailureKind, Observe
from fedlm.report.format import is_number

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

SILO_LABELS = 200
"""Runs with more silos have no series of single silos."""

STALLED_AFTER = 1800.0
"""Seconds without progress after which a run is called stalled, unless told otherwise."""

VERBS = frozenset({"hello", "train", "evaluate", "profile"})

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
"""Bounds of the histograms: from an idle exchange to a round that takes hours."""

PROGRESS = frozenset(
    {"run_started", "phase", "round_started", "silo_started", "step", "silo_done", "round_done", "run_done"}
)
"""Events that show a run getting on; a silo that fails does not."""


@contextlib.contextmanager
def monitored(port: int | None, host: str = "127.0.0.1", stalled_after: float = STALLED_AFTER) -> Iterator[Observe]:
    """An observer whose figures are served while the context lasts; one that does nothing where `port` is None.

    Raises:
        MissingExtra: prometheus_client isn't installed.
        RunError: the port is taken, or the address is not this machine's.
    """
    if port is None:
        yield _ignore
        return
    metrics = RunMetrics(new_registry(), stalled_after)
    with serve_metrics(metrics.registry, port, host, health=metrics.health):
        yield metrics


def _ignore(event: Event) -> None: ...


class RunMetrics:
    """An observer of one run. Events arrive from several threads.

    Args:
        registry: receives the figures.
        stalled_after: seconds without progress after which `health` says that the run is stalled.
        clock: seconds that only grow; for tests.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        stalled_after: float = STALLED_AFTER,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.registry, self._stalled_after, self._clock = registry, stalled_after, clock
        self._lock = threading.Lock()
        self._status, self._run, self._round = "starting", "", -1
        self._progress_at = clock()
        self._asked: dict[tuple[str, str], float] = {}
        self._named = False
        self._tell_of: dict[str, Callable[[Event], None]] = {
            "run_started": self._run_started,
            "round_started": self._round_started,
            "silo_started": self._silo_started,
            "silo_done": self._silo_done,
            "silo_failed": self._silo_failed,
            "step": self._step,
            "round_done": self._round_done,
            "run_done": self._run_done,
        }

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"fedlm_{name}", what, labels, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"fedlm_{name}", what, labels, registry=registry)

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(f"fedlm_{name}", what, labels, buckets=SECONDS, registry=registry)

        self._about = gauge("run_info", "Always 1; the label says which run this is.", "run")
        self._planned = gauge("rounds_planned", "Rounds that the recipe asks for.")
        self._done = gauge("rounds_done", "Rounds finished and on disk.")
        self._current = gauge("round", "The round at work, counted from 0.")
        self._round_seconds = histogram("round_seconds", "Seconds of a round, validation included.")
        self._bytes = counter("bytes", "Bytes of replies and their requests; up is from the silos.", "direction")
        for direction in ("up", "down"):
            self._bytes.labels(direction)
        self._work = histogram("silo_work_seconds", "Seconds of work as the silo reports them.", "verb")
        self._latency = histogram("silo_latency_seconds", "Seconds from a silo's start to its reply's arrival.", "verb")
        self._failures = counter("failures", "Requests that brought no usable reply, by kind.", "kind")
        for kind in FailureKind:
            self._failures.labels(kind.value)
        self._silos = gauge("silos", "Silos that may take part.")
        self._connected = gauge("silos_connected", "Silos in reach: all but those that were not when last asked.")
        self._loss = gauge("train_loss", "Mean training loss of the last round.")
        self._validation = gauge("validation_loss", "Validation loss of the last measured round.")
        for unknown in (self._loss, self._validation):
            unknown.set(math.nan)
        self._peak = gauge("run_peak_pss_bytes", "Highest memory of this process and its children in the last round.")
        self._moment = gauge("last_progress_timestamp_seconds", "When the run last got on, in seconds since 1970.")
        self._moment.set_to_current_time()
        silo = f"by silo (only up to {SILO_LABELS} silos)"
        self._silo_failures = counter("silo_failures", f"Requests without a usable reply, {silo}.", "silo", "kind")
        self._silo_answer = gauge("silo_last_reply_timestamp_seconds", f"When the last reply came, {silo}.", "silo")
        self._silo_loss = gauge("silo_train_loss", f"Training loss of the last reply to train, {silo}.", "silo")
        self._silo_connected = gauge("silo_connected", f"1 while it is in reach, {silo}.", "silo")
        self._absent: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        kind = str(event.get("kind"))
        with self._lock:
            if kind in PROGRESS:
                self._progress_at = self._clock()
                self._moment.set_to_current_time()
            if kind in self._tell_of:
                self._tell_of[kind](event)

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the run got on lately, and {"status", "run", "round", "seconds_since_progress"}."""
        with self._lock:
            quiet = self._clock() - self._progress_at
            over = self._status in ("finished", "interrupted")
            healthy = over or quiet <= self._stalled_after
            return healthy, {
                "status": self._status if healthy else "stalled",
                "run": self._run or None,
                "round": self._round if self._round >= 0 else None,
                "seconds_since_progress": round(quiet, 1),
            }

    # ---------------------------------------------------------------- events

    def _run_started(self, event: Event) -> None:
        silos = list(event.get("silos", []))
        self._status, self._run = "running", str(event.get("run", ""))
        self._named = len(silos) <= SILO_LABELS
        self._absent &= set(silos)
        self._about.labels(self._run).set(1)
        self._planned.set(int(event.get("rounds", 0)))
        self._silos.set(len(silos))
        self._connected.set(len(silos) - len(self._absent))
        if self._named:
            for name in silos:
                self._silo_connected.labels(name).set(name not in self._absent)

    def _round_started(self, event: Event) -> None:
        self._round = int(event["round"])
        self._current.set(self._round)
        self._done.set(max(0, self._round))  # also what a resumed run did before
        self._asked.clear()

    def _silo_started(self, event: Event) -> None:
        self._asked[str(event.get("silo")), str(event.get("verb"))] = self._clock()
        self._reached(str(event.get("silo", "")), True)

    def _step(self, event: Event) -> None:
        self._reached(str(event.get("silo", "")), True)

    def _silo_done(self, event: Event) -> None:
        silo, verb = str(event.get("silo")), str(event.get("verb"))
        self._reached(silo, True)
        label = verb if verb in VERBS else "other"
        asked = self._asked.pop((silo, verb), None)
        if asked is not None:
            self._latency.labels(label).observe(self._clock() - asked)
        if is_number(event.get("seconds")):
            self._work.labels(label).observe(float(event["seconds"]))
        for direction in ("up", "down"):
            self._bytes.labels(direction).inc(max(0, int(event.get(f"bytes_{direction}", 0))))
        if self._named:
            self._silo_answer.labels(silo).set_to_current_time()
            if verb == "train" and is_number(event.get("loss")):
                self._silo_loss.labels(silo).set(float(event["loss"]))

    def _silo_failed(self, event: Event) -> None:
        silo, kind = str(event.get("silo")), str(event.get("failure"))
        kind = kind if kind in list(FailureKind) else FailureKind.ERROR.value
        for asked in [key for key in self._asked if key[0] == silo]:
            del self._asked[asked]
        self._failures.labels(kind).inc()
        if kind == FailureKind.UNREACHABLE:
            self._reached(silo, False)
        if self._named:
            self._silo_failures.labels(silo, kind).inc()

    def _reached(self, silo: str, here: bool) -> None:
        if not silo or here == (silo not in self._absent):
            return
        self._absent ^= {silo}
        self._connected.inc(1 if here else -1)
        if self._named:
            self._silo_connected.labels(silo).set(here)

    def _round_done(self, event: Event) -> None:
        number = int(event["round"])
        self._done.set(number + 1)
        if number >= 0:  # -1 is the measurement of the base model
            self._round_seconds.observe(float(event["seconds"]))
        if is_number(event.get("loss")):
            self._loss.set(float(event["loss"]))
        loss = (event.get("validation") or {}).get("loss")
        if is_number(loss):
            self._validation.set(float(loss))
        if is_number(event.get("peak_pss")):
            self._peak.set(float(event["peak_pss"]))

    def _run_done(self, event: Event) -> None:
        self._status = str(event.get("status", "finished"))
