"""A run's figures as Prometheus reads them, its health, and how it is served."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedlm.endpoint import WATCHERS, Endpoint, new_registry, serve_metrics
from fedlm.errors import MissingExtra, RunError
from fedlm.report.metrics import SILO_LABELS, RunMetrics, monitored


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def read(metrics: RunMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"fedlm_{name}", labels)


def series(metrics: RunMetrics) -> list[Any]:
    return [sample for family in metrics.registry.collect() for sample in family.samples]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics(clock: Clock) -> RunMetrics:
    return RunMetrics(new_registry(), stalled_after=60, clock=clock)


def start(metrics: RunMetrics, silos: list[str]) -> None:
    metrics({"kind": "run_started", "run": "news-1", "rounds": 3, "silos": silos, "run_dir": "runs/a"})


def answer(metrics: RunMetrics, clock: Clock, silo: str, verb: str, took: float, **more: Any) -> None:
    metrics({"kind": "silo_started", "round": 0, "silo": silo, "verb": verb})
    clock.now += took
    metrics({"kind": "silo_done", "round": 0, "silo": silo, "verb": verb, **more})


def round_done(metrics: RunMetrics, number: int, **more: Any) -> None:
    record = {"round": number, "seconds": 4.0, "loss": 2.5, "validation": {"loss": 1.5}, "peak_pss": 10**9}
    metrics({"kind": "round_done", **record, **more})


def test_a_round_is_counted(metrics: RunMetrics, clock: Clock) -> None:
    start(metrics, ["a", "b"])
    round_done(metrics, -1, loss=None)
    metrics({"kind": "round_started", "round": 0, "sampled": ["a", "b"]})
    answer(metrics, clock, "a", "train", 4.0, seconds=3.0, loss=2.0, bytes_up=10, bytes_down=7)
    answer(metrics, clock, "a", "evaluate", 1.0, seconds=0.5, bytes_up=1, bytes_down=7)
    metrics({"kind": "silo_failed", "round": 0, "silo": "b", "failure": "timed_out", "reason": "slow"})
    round_done(metrics, 0)

    assert read(metrics, "run_info", run="news-1") == 1
    assert (read(metrics, "rounds_planned"), read(metrics, "rounds_done"), read(metrics, "round")) == (3, 1, 0)
    assert (read(metrics, "bytes_total", direction="up"), read(metrics, "bytes_total", direction="down")) == (11, 14)
    assert read(metrics, "silo_latency_seconds_sum", verb="train") == 4.0
    assert read(metrics, "silo_work_seconds_sum", verb="train") == 3.0
    assert read(metrics, "silo_latency_seconds_count", verb="evaluate") == 1
    assert read(metrics, "failures_total", kind="timed_out") == 1
    assert read(metrics, "failures_total", kind="refused") == 0
    assert read(metrics, "silo_failures_total", silo="b", kind="timed_out") == 1
    assert read(metrics, "silo_train_loss", silo="a") == 2.0
    assert (read(metrics, "round_seconds_count"), read(metrics, "round_seconds_sum")) == (1, 4.0)
    assert (read(metrics, "train_loss"), read(metrics, "validation_loss")) == (2.5, 1.5)
    assert read(metrics, "run_peak_pss_bytes") == 10**9


def test_before_the_first_round_there_is_no_loss(metrics: RunMetrics) -> None:
    start(metrics, ["a"])
    assert math.isnan(read(metrics, "train_loss") or 0.0)


def test_a_resumed_run_has_done_the_rounds_before(metrics: RunMetrics) -> None:
    start(metrics, ["a"])
    metrics({"kind": "round_started", "round": 2, "sampled": ["a"]})
    assert read(metrics, "rounds_done") == 2


def test_a_silo_out_of_reach_is_counted_once(metrics: RunMetrics, clock: Clock) -> None:
    lost = {"kind": "silo_failed", "round": 0, "failure": "unreachable", "reason": "it is not connected"}
    start(metrics, ["a", "b", "c"])
    assert read(metrics, "silos_connected") == 3
    for _ in range(2):
        metrics({**lost, "silo": "a"})
        assert read(metrics, "silos_connected") == 2
    metrics({**lost, "silo": "b"})
    metrics({**lost, "silo": "c", "failure": "refused"})  # whoever refuses is there
    assert (read(metrics, "silos_connected"), read(metrics, "silo_connected", silo="a")) == (1, 0)
    answer(metrics, clock, "a", "train", 1.0)
    metrics({"kind": "step", "silo": "b", "step": 0, "steps": 2})
    assert (read(metrics, "silos_connected"), read(metrics, "silo_connected", silo="a")) == (3, 1)


def test_the_number_of_series_is_bounded(clock: Clock) -> None:
    def count(silos: int) -> int:
        metrics = RunMetrics(new_registry(), clock=clock)
        names = [f"silo-{i}" for i in range(silos)]
        start(metrics, names)
        for name in names:
            for number in range(3):
                answer(metrics, clock, name, f"verb-{name}-{number}", 0.1, seconds=1.0)
                metrics({"kind": "silo_failed", "silo": name, "failure": f"made up {name}"})
        return len(series(metrics))

    base = count(SILO_LABELS + 1)
    assert base == count(SILO_LABELS + 500)
    assert count(SILO_LABELS) <= base + SILO_LABELS * 4


def test_no_text_of_an_event_becomes_a_label(metrics: RunMetrics, clock: Clock) -> None:
    secret = "the patient has"
    start(metrics, ["a"])
    metrics({"kind": "phase", "text": secret})
    metrics({"kind": "silo_failed", "silo": "a", "failure": secret, "reason": secret})
    answer(metrics, clock, "a", secret, 1.0, seconds=1.0, text=secret)
    assert secret not in repr(series(metrics))
    assert read(metrics, "failures_total", kind="error") == 1


def test_health_tells_a_stall(metrics: RunMetrics, clock: Clock) -> None:
    assert metrics.health() == (True, {"status": "starting", "run": None, "round": None, "seconds_since_progress": 0.0})
    start(metrics, ["a"])
    metrics({"kind": "round_started", "round": 0, "sampled": ["a"]})
    clock.now += 59
    metrics({"kind": "silo_failed", "silo": "a", "failure": "unreachable"})  # no progress
    assert metrics.health()[0]
    clock.now += 2
    healthy, facts = metrics.health()
    assert (healthy, facts["status"], facts["round"], facts["seconds_since_progress"]) == (False, "stalled", 0, 61.0)
    metrics({"kind": "step", "silo": "a", "step": 0, "steps": 5})
    assert metrics.health()[1]["status"] == "running"
    metrics({"kind": "run_done", "status": "finished"})
    clock.now += 1000
    assert metrics.health()[0]


# ---------------------------------------------------------------- over HTTP


@pytest.fixture
def endpoint(metrics: RunMetrics) -> Iterator[Endpoint]:
    with serve_metrics(metrics.registry, 0, health=metrics.health) as server:
        yield server


def get(endpoint: Endpoint, path: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(endpoint.host, endpoint.port, timeout=5)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.headers["Content-Type"], reply.read().decode()
    finally:
        connection.close()


def test_prometheus_can_read_it(endpoint: Endpoint, metrics: RunMetrics) -> None:
    start(metrics, ["a"])
    status, kind, body = get(endpoint, "/metrics")
    assert status == 200 and kind.startswith("text/plain")
    values = {sample.name: sample.value for family in text_string_to_metric_families(body) for sample in family.samples}
    assert values["fedlm_silos"] == 1
    assert values["process_resident_memory_bytes"] > 10**6
    assert values["fedlm_process_threads"] >= 2
    assert not [name for name in values if name.endswith("_created")]


def test_health_over_http(endpoint: Endpoint, metrics: RunMetrics, clock: Clock) -> None:
    start(metrics, ["a"])
    status, kind, body = get(endpoint, "/health")
    assert (status, kind, json.loads(body)["run"]) == (200, "application/json", "news-1")
    clock.now += 61
    status, _, body = get(endpoint, "/health?verbose=1")
    assert (status, json.loads(body)["status"]) == (503, "stalled")
    assert get(endpoint, "/elsewhere")[0] == 404


def test_it_listens_on_this_machine_only(endpoint: Endpoint) -> None:
    assert endpoint.host == "127.0.0.1"
    assert endpoint._server.socket.getsockname()[0] == "127.0.0.1"


def test_many_watchers_cannot_exhaust_threads(endpoint: Endpoint) -> None:
    before = threading.active_count()
    silent = [socket.create_connection((endpoint.host, endpoint.port)) for _ in range(WATCHERS * 3)]
    try:
        silent[-1].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert silent[-1].recv(1) == b"", "closed at once"
        assert threading.active_count() <= before + WATCHERS
    finally:
        for connection in silent:
            connection.close()


def test_a_busy_port_is_named(endpoint: Endpoint, metrics: RunMetrics) -> None:
    with pytest.raises(RunError, match=rf"127\.0\.0\.1:{endpoint.port}.*in use.*free port"):
        serve_metrics(metrics.registry, endpoint.port, health=metrics.health)


def test_after_closing_the_port_is_free(metrics: RunMetrics) -> None:
    server = serve_metrics(metrics.registry, 0, health=metrics.health)
    server.close()
    with serve_metrics(metrics.registry, server.port, health=metrics.health) as again:
        assert get(again, "/health")[0] == 200


def test_without_a_port_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with monitored(None) as observe:
        observe({"kind": "run_started"})
    with pytest.raises(MissingExtra, match=r"fedlm\[network\]"), monitored(1):
        pass


def test_the_endpoint_needs_no_torch() -> None:
    code = "import sys, fedlm.endpoint, fedlm.logs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
