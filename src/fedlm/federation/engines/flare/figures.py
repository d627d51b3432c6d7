"""What a silo's worker has done, for Prometheus: requests by verb and outcome, seconds, bytes, memory.

The worker counts; its supervisor, which outlives it, answers whoever watches. Between them lies a small file that is
replaced after every request, so a worker that was killed or hangs can still be asked about. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fedlm.messages import Failure, Observe, Reply, Request

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.metrics_core import Metric
    from torch import Tensor

    from fedlm.federation.engines.worker import Handle

log = logging.getLogger("fedlm.silo")

FILE = "figures.json"
"""In KIT/run."""

OK = "ok"

VERBS = frozenset({"hello", "train", "evaluate", "profile", "pairs", "score", "answer"})
"""Others are counted together: a coordinator may ask for anything."""


def counted(handle: Handle, file: Path) -> Handle:
    """The same handler, counting what it answers.

    Args:
        file: where the counts go; started afresh here, as this process's are.
    """
    process, lock = psutil.Process(), threading.Lock()
    figures: dict[str, Any] = {"pid": process.pid, "born": process.create_time(), "busy": 0, "last": None, "verbs": {}}
    _write(file, figures)

    def answer(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        began = time.monotonic()
        with lock:
            figures["busy"] += 1
            _write(file, figures)
        outcome, sent = "error", 0
        try:
            reply = handle(request, observe, should_stop)
            if isinstance(reply, Failure):
                outcome = reply.kind.value
            else:
                outcome, sent = OK, _size(reply.tensors)
            return reply
        finally:
            with lock:
                verb = request.verb if request.verb in VERBS else "other"
                line = figures["verbs"].setdefault(verb, {"outcomes": {}, "seconds": 0.0, "in": 0, "out": 0})
                line["outcomes"][outcome] = line["outcomes"].get(outcome, 0) + 1
                line["seconds"] += time.monotonic() - began
                line["in"] += _size(request.tensors)
                line["out"] += sent
                figures["busy"] -= 1
                figures["last"] = time.time()
                _write(file, figures)

    return answer


def serve_figures(registry: CollectorRegistry, file: Path) -> None:
    """Add to a registry what the worker has written; nothing while there is no such file."""
    registry.register(_Figures(file))


class _Figures:
    def __init__(self, file: Path) -> None:
        self._file = file

    def describe(self) -> Iterator[Metric]:
        """Their names: a registry that knows them refuses to hold the same figures twice."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        requests = CounterMetricFamily(
            "fedlm_silo_requests",
            "Requests since the worker started, by verb and outcome: ok, or the kind of the failure.",
            labels=["verb", "outcome"],
        )
        seconds = CounterMetricFamily("fedlm_silo_request_seconds", "Seconds of work, by verb.", labels=["verb"])
        moved = CounterMetricFamily(
            "fedlm_silo_tensor_bytes", "Bytes of tensors received (in) and sent (out).", labels=["verb", "way"]
        )
        busy = GaugeMetricFamily("fedlm_silo_busy", "Requests at work now.")
        memory = GaugeMetricFamily("fedlm_silo_worker_memory_bytes", "Resident memory of the worker.")
        last = GaugeMetricFamily(
            "fedlm_silo_last_request_timestamp_seconds", "When the last request was answered, in seconds since 1970."
        )
        figures = _read(self._file)
        if figures is not None:
            for verb, line in sorted(figures["verbs"].items()):
                for outcome, count in sorted(line["outcomes"].items()):
                    requests.add_metric([verb, outcome], count)
                seconds.add_metric([verb], line["seconds"])
                for way in ("in", "out"):
                    moved.add_metric([verb, way], line[way])
            resident = _memory(figures)
            busy.add_metric([], figures["busy"] if resident is not None else 0)
            if resident is not None:
                memory.add_metric([], resident)
            if figures["last"] is not None:
                last.add_metric([], figures["last"])
        yield from (requests, seconds, moved, busy, memory, last)


def _memory(figures: dict[str, Any]) -> int | None:
    """Bytes of the process that wrote the figures, if it still runs; another one may have got its number."""
    try:
        process = psutil.Process(figures["pid"])
        return int(process.memory_info().rss) if process.create_time() == figures["born"] else None
    except psutil.Error:
        return None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        figures: dict[str, Any] = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    return figures


def _write(file: Path, figures: dict[str, Any]) -> None:
    """Replace the file. It need not survive a power cut, so nothing waits for the disk; nor is it worth a request."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(figures))
        temporary.replace(file)
    except OSError as error:
        log.warning("the figures for Prometheus were not written: %s", error.strerror)


def _size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of tensors; those that lie in a file say so themselves, without being read."""
    known: int | None = getattr(tensors, "nbytes", None)
    return known if known is not None else sum(t.numel() * t.element_size() for t in tensors.values())
