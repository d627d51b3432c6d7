"""What a silo's worker has done, as its supervisor tells Prometheus."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlm.endpoint import new_registry
from fedlm.federation.engines.flare.figures import counted, serve_figures
from fedlm.messages import Failure, FailureKind, Observe, Reply, Request

UPDATE = {"a": torch.zeros(3, dtype=torch.bfloat16)}


class Watched:
    """A worker's handler that is counted, and the registry that a supervisor would serve."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "figures.json"
        self.registry = new_registry()
        serve_figures(self.registry, self.file)
        self.busy: float | None = None
        self.handle = counted(self._answer, self.file)

    def _answer(self, request: Request, observe: Observe, should_stop: object) -> Reply | Failure:  # noqa: ARG002
        self.busy = self.value("busy")
        if request.verb == "train":
            return Reply(request.silo, request.verb, request.run, request.round, tensors=UPDATE)
        if request.verb == "evaluate":
            raise MemoryError
        return Failure(request.silo, FailureKind.REFUSED, "policy")

    def ask(self, verb: str) -> None:
        tensors = {"a": torch.zeros(5, dtype=torch.float32)}
        self.handle(Request("hospital-a", verb, "run", 0, tensors=tensors), print, lambda: False)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"fedlm_silo_{name}", labels)


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_requests_are_counted_by_verb_and_outcome(watched: Watched) -> None:
    assert watched.value("last_request_timestamp_seconds") is None
    watched.ask("train")
    assert watched.busy == 1
    watched.ask("train")
    watched.ask("rm -rf")
    with pytest.raises(MemoryError):
        watched.ask("evaluate")
    assert watched.value("requests_total", verb="train", outcome="ok") == 2
    assert watched.value("requests_total", verb="other", outcome="refused") == 1
    assert watched.value("requests_total", verb="evaluate", outcome="error") == 1
    assert watched.value("tensor_bytes_total", verb="train", way="in") == 2 * 20
    assert watched.value("tensor_bytes_total", verb="train", way="out") == 2 * 6
    assert (watched.value("request_seconds_total", verb="train") or 0) > 0
    assert watched.value("busy") == 0
    assert (watched.value("worker_memory_bytes") or 0) > 10**7
    assert (watched.value("last_request_timestamp_seconds") or 0) > 1.7e9


def test_of_a_dead_worker_only_what_it_did_remains(watched: Watched) -> None:
    watched.ask("train")
    figures = json.loads(watched.file.read_text())
    # its number belongs to a process that began at another time
    watched.file.write_text(json.dumps({**figures, "born": figures["born"] - 1000.0, "busy": 1}))
    assert watched.value("requests_total", verb="train", outcome="ok") == 1
    assert watched.value("worker_memory_bytes") is None and watched.value("busy") == 0
    Watched(watched.file.parent)  # started again
    assert watched.value("requests_total", verb="train", outcome="ok") is None


def test_before_a_worker_there_is_nothing(tmp_path: Path) -> None:
    registry = new_registry()
    serve_figures(registry, tmp_path / "figures.json")
    assert registry.get_sample_value("fedlm_silo_busy") is None


def test_figures_are_served_once(watched: Watched) -> None:
    with pytest.raises(ValueError, match="Duplicated"):
        serve_figures(watched.registry, watched.file)


def test_a_full_disk_costs_no_request(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.file.unlink()
    watched.file.parent.rmdir()
    watched.ask("train")
    assert "not written" in caplog.text


def test_the_supervisor_needs_no_torch() -> None:
    code = "import sys, fedlm.federation.engines.flare.figures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
