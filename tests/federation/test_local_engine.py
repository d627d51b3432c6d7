"""The local engine: worker processes survive kill -9 and leave no orphans. What every engine does: test_engines."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.errors import ModelError
from fedlm.federation.engines.local import LocalEngine, resolve_workers
from fedlm.federation.engines.pool import Batch, Job, Worker, own_gpu
from fedlm.messages import Event, Failure, FailureKind, Reply, Request
from fedlm.recipe.schema import FederationSpec
from tests.federation.conftest import Tiny
from tests.federation.exchanges import assert_same, by_silo, requests

LONG = "training.steps=400"


@pytest.fixture(scope="module")
def two(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalEngine, list[Event]]]:
    events: list[Event] = []
    recipe = tiny.recipe()
    data = load_data(recipe, tiny.base)
    folder = tmp_path_factory.mktemp("two-workers")
    engine = LocalEngine(recipe, data, folder, workers=2, observe=events.append, base=tiny.base)
    engine.start()
    yield engine, events
    engine.close()


@pytest.fixture(scope="module")
def serial_answers(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reply]:
    recipe = tiny.recipe()
    data = load_data(recipe, tiny.base)
    engine = LocalEngine(recipe, data, tmp_path_factory.mktemp("serial"), workers=1, base=tiny.base)
    return by_silo(engine.exchange(requests(recipe, "serial", [*data.names, "_pooled"])))


def test_a_killed_worker_is_replaced_and_its_request_repeated(
    two: tuple[LocalEngine, list[Event]], tiny: Tiny, serial_answers: dict[str, Reply]
) -> None:
    engine, events = two
    before = list(engine.workers)
    events.clear()
    killed = False
    found = {}
    answers = engine.exchange(requests(tiny.recipe(), "killed", list(engine.silos())))

    def kill() -> None:
        while not any(e["kind"] == "silo_started" for e in events):
            time.sleep(0.001)
        os.kill(before[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    for answer in answers:
        assert isinstance(answer, Reply), answer
        found[answer.silo] = answer
        killed = True
    thread.join()
    assert killed and len(found) == 4
    assert_same(found, serial_answers)
    # Whether it died at work or idle, the next exchange has two live workers again.
    by_silo(engine.exchange(requests(tiny.recipe(), "after", list(engine.silos()) * 1)))
    assert before[0] not in engine.workers


def test_a_silo_that_kills_its_worker_twice_is_unreachable(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(LONG)
    events: list[Event] = []
    engine = LocalEngine(
        recipe, load_data(recipe, tiny.base), tmp_path, workers=2, observe=events.append, base=tiny.base
    )
    try:
        engine.start()
        stop = threading.Event()

        def kill_whoever_starts() -> None:
            seen = 0
            while not stop.wait(0.005):
                if sum(e["kind"] == "step" for e in events) > seen:
                    for pid in engine.workers:
                        os.kill(pid, signal.SIGKILL)
                    time.sleep(0.5)
                    seen = sum(e["kind"] == "step" for e in events)

        thread = threading.Thread(target=kill_whoever_starts)
        thread.start()
        answers = list(engine.exchange(requests(recipe, "r", ["site0"])))
        stop.set()
        thread.join()
        assert [type(a) for a in answers] == [Failure]
        assert isinstance(answers[0], Failure) and answers[0].kind is FailureKind.UNREACHABLE
        assert "died each time (signal 9" in answers[0].reason
        # A deadline: the silo is told to stop and the worker serves the next request soon.
        start = time.monotonic()
        late = list(engine.exchange(requests(recipe, "late", ["site1", "site2", "site3"]), deadline=1.0))
        assert time.monotonic() - start < 30
        assert all(isinstance(a, Failure) and a.kind is FailureKind.TIMED_OUT for a in late) and len(late) == 3
        hello = list(engine.exchange([Request("site1", "hello", "late", -1)]))
        assert isinstance(hello[0], Reply)
        assert not list((tmp_path / "silos").glob("*/late/*")), "a stopped request must store nothing"
    finally:
        engine.close()
    assert not list((tmp_path / "spool").iterdir())


def test_a_model_fault_in_a_worker_is_raised_as_itself(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe("adapter.targets=[no_such_layer]")
    engine = LocalEngine(recipe, load_data(recipe, tiny.base), tmp_path, workers=2, base=tiny.base)
    with pytest.raises(ModelError, match="no_such_layer"):
        engine.exchange([])
    assert not psutil.Process().children(recursive=True) or engine.workers == []
    engine.close()


def test_closing_ends_every_exchange_of_other_threads(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe()
    data = load_data(recipe, tiny.base)
    hellos = [Request("site0", "hello", "closing", -1) for _ in range(20)]
    engine = LocalEngine(recipe, data, tmp_path, workers=2, base=tiny.base)
    engine.start()
    ended: list[list[Reply | Failure]] = []

    def ask_until_refused() -> None:
        answers: list[Reply | Failure] = []
        while not any(isinstance(a, Failure) for a in answers):
            answers = list(engine.exchange(hellos))
        ended.append(answers)

    threads = [threading.Thread(target=ask_until_refused, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    engine.close()
    threads.append(threading.Thread(target=ask_until_refused, daemon=True))  # one that comes too late
    threads[-1].start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(ended) == 5, "an exchange still waits for workers that are gone"
    for answers in ended:
        assert len(answers) == 20
        refused = [a for a in answers if isinstance(a, Failure)]
        assert refused and all(a.reason == "the engine was closed" for a in refused)
    assert engine.workers == []


def test_what_is_still_queued_when_the_engine_closes_is_answered(tiny: Tiny, tmp_path: Path) -> None:
    engine = LocalEngine(tiny.recipe(), load_data(tiny.recipe(), tiny.base), tmp_path, workers=2, base=tiny.base)
    batch = Batch()
    engine._queue.put(Job(0, Request("site0", "hello", "late", -1), batch, None, 0))
    engine.close()
    _, answer = batch.answers.get_nowait()
    assert isinstance(answer, Failure) and answer.reason == "the engine was closed"


def test_a_worker_that_starts_while_the_engine_closes_is_ended(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = LocalEngine(tiny.recipe(), load_data(tiny.recipe(), tiny.base), tmp_path, workers=2, base=tiny.base)
    (tmp_path / "logs").mkdir()
    worker, spawn = Worker(engine._setup, 0), Worker.spawn

    def spawn_too_late(self: Worker) -> None:
        self.kill()  # finds no process yet
        spawn(self)

    monkeypatch.setattr(Worker, "spawn", spawn_too_late)
    answer = worker._answer(Job(0, Request("site0", "hello", "late", -1), Batch(), None, 0))
    assert isinstance(answer, Failure) and answer.reason == "the engine was closed"
    assert worker._process is not None and worker.pid is None


def test_a_reply_that_is_too_long_says_so(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is lowered in the worker's own process, through a sitecustomize on its path."""
    (tmp_path / "sitecustomize.py").write_text("import fedlm.federation.engines.lines as w\nw.MAX_LINE = 3000\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    recipe = tiny.recipe("training.steps=150")
    engine = LocalEngine(recipe, load_data(recipe, tiny.base), tmp_path, workers=2, base=tiny.base)
    try:
        (answer,) = engine.exchange(requests(recipe, "long", ["site0"]))
        assert isinstance(answer, Failure) and "over the bound of 3000" in answer.reason
    finally:
        engine.close()


@pytest.mark.slow
def test_no_orphans_when_the_parent_is_killed(tiny: Tiny, tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from fedlm.data.federated import load_data
from fedlm.federation.engines.local import LocalEngine
from fedlm.recipe.load import load_recipe
recipe = load_recipe(Path({str(tiny.base)!r}) / "recipe.yaml", [])
data = load_data(recipe, Path({str(tiny.base)!r}))
engine = LocalEngine(recipe, data, Path({str(tmp_path)!r}), workers=2, base=Path({str(tiny.base)!r}))
engine.start()
print(*engine.workers, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(psutil.pid_exists(pid) for pid in workers)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)


def _alive(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_automatic_workers() -> None:
    cores = len(os.sched_getaffinity(0))
    assert resolve_workers(FederationSpec(), 1000, "cpu") == cores
    assert resolve_workers(FederationSpec(threads=cores), 1000, "cpu") == 1
    assert resolve_workers(FederationSpec(), 1, "cpu") == 1
    assert resolve_workers(FederationSpec(workers=3), 1000, "cpu") == 3


def test_several_gpus_have_a_worker_each(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_workers(FederationSpec(), 1000, "cuda") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert resolve_workers(FederationSpec(), 1000, "auto") == resolve_workers(FederationSpec(), 1000, "cuda") == 4
    assert resolve_workers(FederationSpec(), 3, "cuda") == 3
    assert [own_gpu(i)["CUDA_VISIBLE_DEVICES"] for i in range(5)] == ["0", "1", "2", "3", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,GPU-7")
    assert own_gpu(3) == {"CUDA_VISIBLE_DEVICES": "GPU-7"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_gpu(3) == {}
