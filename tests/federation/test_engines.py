"""What every engine promises, tested on each: one suite, an engine per parameter.

Another engine joins by an entry in `OPEN`: a context manager that gives an engine of the tiny federation, for a recipe,
its data, a run directory and an observer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fedlm.data.federated import FederatedData, load_data
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Engine, Event, Failure, FailureKind, Observe, Reply, Request, Stop
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.exchanges import assert_same, by_silo, requests, running_ray

Open = Callable[[Recipe, FederatedData, Path, Path, Observe], AbstractContextManager[Engine]]


def local(workers: int) -> Open:
    def open_engine(recipe: Recipe, data: FederatedData, base: Path, folder: Path, observe: Observe) -> closing[Engine]:
        return closing(LocalEngine(recipe, data, folder, workers=workers, observe=observe, base=base))

    return open_engine


def ray(recipe: Recipe, data: FederatedData, base: Path, folder: Path, observe: Observe) -> closing[Engine]:
    from fedlm.federation.engines.ray.engine import RayEngine

    two = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"workers": 2})})
    return closing(RayEngine(two, data, folder, observe=observe, base=base))


@contextmanager
def flare(recipe: Recipe, data: FederatedData, base: Path, folder: Path, observe: Observe) -> Iterator[Engine]:  # noqa: ARG001
    """Both relays, parts, sockets and certificates, without NVFlare's processes: those have tests of their own."""
    from fedlm.federation.engines.flare.engine import FlareEngine
    from fedlm.federation.engines.flare.worker import quiet
    from tests.federation.flare.loop import Loop

    bench = Workbench(recipe, data)

    def handle(request: Request, tell: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        silo = Silo(request.silo, bench, folder / "silos", observe=quiet(tell), should_stop=should_stop)
        return silo.handle(request)

    (folder / "silos").mkdir(parents=True, exist_ok=True)
    loop = Loop(folder / "network", tuple(data.names), dict.fromkeys(data.names, handle))
    with closing(FlareEngine(recipe, loop.kit.path, "run", folder, observe=observe)) as engine:
        yield engine


OPEN: dict[str, Open] = {"in-process": local(1), "workers": local(2), "ray": ray, "flare": flare}


@dataclass
class Case:
    """An engine under test."""

    name: str
    engine: Engine
    recipe: Recipe
    folder: Path
    events: list[Event] = field(default_factory=list)

    @property
    def counted(self) -> bool:
        """Whether bytes are those of the tensors' files: over a network they are what really travelled."""
        return self.name != "flare"

    def steps(self, run: str) -> list[Event]:
        return [e for e in self.events if e["kind"] == "step" and e["run"] == run]


@pytest.fixture(
    scope="module", params=[pytest.param(k, marks=pytest.mark.slow) if k == "ray" else k for k in sorted(OPEN)]
)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    name = str(request.param)
    if name == "ray":
        pytest.importorskip("ray")
        with running_ray(tmp_path_factory.mktemp("ray") / "ray.log"):
            yield name
    else:
        yield name


def opened(kind: str, tiny: Tiny, folder: Path, *changes: str) -> Iterator[Case]:
    recipe = tiny.recipe(*changes)
    events: list[Event] = []
    with OPEN[kind](recipe, load_data(recipe, tiny.base), tiny.base, folder, events.append) as engine:
        yield Case(kind, engine, recipe, folder, events)


@pytest.fixture(scope="module")
def case(kind: str, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    yield from opened(kind, tiny, tmp_path_factory.mktemp(f"engine-{kind}"))


@pytest.fixture(scope="module")
def slow_case(kind: str, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Training takes minutes, so that nobody waits for its end."""
    yield from opened(kind, tiny, tmp_path_factory.mktemp(f"slow-{kind}"), "training.steps=100000")


@pytest.fixture(scope="module")
def wanted(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reply]:
    """The answers that every engine must give."""
    recipe = tiny.recipe()
    data = load_data(recipe, tiny.base)
    with closing(LocalEngine(recipe, data, tmp_path_factory.mktemp("wanted"), workers=1, base=tiny.base)) as engine:
        return by_silo(engine.exchange(requests(recipe, "wanted", [*data.names, "_pooled"])))


def test_same_bits_bytes_and_events(case: Case, wanted: dict[str, Reply]) -> None:
    names = [*case.engine.silos(), *([] if case.name == "flare" else ["_pooled"])]  # exists in simulation only
    assert list(case.engine.silos()) == ["site0", "site1", "site2", "site3"]
    assert_same(by_silo(case.engine.exchange(requests(case.recipe, "bits", names))), wanted, case.counted)
    assert len(case.steps("bits")) == 3 * len(names)
    assert sorted(e["silo"] for e in case.events if e["kind"] == "silo_started" and e["run"] == "bits") == sorted(names)
    assert wanted["site0"].fields["sent_bytes"] > 1000


def test_what_a_silo_can_do_is_planned_at_hello_and_holds_in_training(case: Case) -> None:
    hello = Request("site1", "hello", "plan", -1, fields={"protocol": 1, "capacity": {"layers": 1, "steps": 2}})
    plan = by_silo(case.engine.exchange([hello]))["site1"].fields["card"]["plan"]
    assert plan == {"rank": 2, "first_layer": 1, "steps": 2}
    (asked,) = requests(case.recipe, "plan", ["site1"])
    reply = by_silo(case.engine.exchange([replace(asked, fields={**asked.fields, "plan": plan})]))["site1"]
    assert reply.fields["steps"] == 2
    assert len(reply.tensors) == 2 * 14 and all(".layers.1." in name for name in reply.tensors)


def test_a_repeated_request_is_answered_from_what_the_silo_stored(case: Case, wanted: dict[str, Reply]) -> None:
    asked = requests(case.recipe, "repeat", ["site1", "site2"])
    first, second = (by_silo(case.engine.exchange(asked)) for _ in range(2))
    assert_same(second, first, case.counted)
    assert_same(second, wanted, case.counted)
    assert all(reply.fields["repeated"] for reply in second.values())
    assert not any("repeated" in reply.fields for reply in first.values())
    assert len(case.steps("repeat")) == 3 * 2


def test_several_exchanges_at_once(case: Case, wanted: dict[str, Reply]) -> None:
    groups = [["site0", "site1"], ["site2"], ["site3", "site0"]]
    found: dict[int, dict[str, Reply]] = {}

    def one(number: int) -> None:
        found[number] = by_silo(case.engine.exchange(requests(case.recipe, f"thread-{number}", groups[number])))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, got in found.items():
        assert_same(got, wanted, case.counted)
        assert {e["silo"] for e in case.steps(f"thread-{number}")} == set(groups[number])
    assert sorted(map(len, found.values())) == [1, 2, 2]


def test_unknown_silos(case: Case, wanted: dict[str, Reply]) -> None:
    answers = list(case.engine.exchange(requests(case.recipe, "unknown", ["nobody", "../escape", "site2"])))
    failures = {a.silo: a.kind for a in answers if isinstance(a, Failure)}
    assert failures == {"nobody": FailureKind.UNREACHABLE, "../escape": FailureKind.UNREACHABLE}
    assert_same(by_silo(a for a in answers if isinstance(a, Reply)), wanted, case.counted)


def test_a_verb_that_no_silo_knows_is_refused(case: Case) -> None:
    (answer,) = case.engine.exchange([Request("site0", "format-disk", "verbs", 0)])
    assert isinstance(answer, Failure) and answer.kind is FailureKind.REFUSED


def test_an_iterator_closed_early_leaves_the_engine_ready(case: Case, wanted: dict[str, Reply]) -> None:
    answers = case.engine.exchange(requests(case.recipe, "early", case.engine.silos()))
    first = next(answers)
    answers.close()  # type: ignore[attr-defined]
    assert isinstance(first, Reply)
    assert_same(by_silo(case.engine.exchange(requests(case.recipe, "next", ["site3"]))), wanted, case.counted)


def test_a_deadline(slow_case: Case) -> None:
    """Silos without a reply have timed out, nothing of theirs is stored, and the engine serves the next soon."""
    engine = slow_case.engine
    list(engine.exchange([Request("site0", "hello", "warm", -1)]))
    start = time.monotonic()
    late = list(engine.exchange(requests(slow_case.recipe, "late", ["site1", "site2", "site3"]), deadline=1.0))
    assert [a.kind for a in late if isinstance(a, Failure)] == [FailureKind.TIMED_OUT] * 3
    told = len(slow_case.events)
    (hello,) = engine.exchange([Request("site1", "hello", "late", -1)])
    assert isinstance(hello, Reply)
    assert time.monotonic() - start < 20
    assert len(slow_case.events) == told, "what comes after the deadline is dropped"
    assert not list((slow_case.folder / "silos").glob("*/late/*"))


def test_an_exchange_is_stopped_from_another_thread(slow_case: Case) -> None:
    """As by its deadline; a stop that was called before ends an exchange before it begins."""
    engine, stop = slow_case.engine, Stop()
    told = len(slow_case.events)

    def stop_at_work() -> None:
        until = time.monotonic() + 30
        while not slow_case.steps("stopped") and time.monotonic() < until:
            time.sleep(0.01)
        stop.now()

    threading.Thread(target=stop_at_work, daemon=True).start()
    for expected in (1, 0):
        (answer,) = engine.exchange(requests(slow_case.recipe, "stopped", ["site1"]), None, stop)
        assert isinstance(answer, Failure) and answer.kind is FailureKind.TIMED_OUT
        assert (len(slow_case.events) > told) == bool(expected)
        told = len(slow_case.events)
    (hello,) = engine.exchange([Request("site1", "hello", "stopped", -1)], deadline=60.0)
    assert isinstance(hello, Reply)
    assert not list((slow_case.folder / "silos").glob("*/stopped/*"))


def test_closing_the_engine_ends_the_exchanges_of_other_threads(slow_case: Case) -> None:
    if slow_case.name == "in-process":
        pytest.skip("it works only while it is asked")
    ended: list[list[Reply | Failure]] = []

    def ask(name: str) -> None:
        ended.append(list(slow_case.engine.exchange(requests(slow_case.recipe, "closing", [name]))))

    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in slow_case.engine.silos()]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    at_once = 1 if slow_case.name == "flare" else 2  # its silos share one bench here
    while len({e["silo"] for e in slow_case.steps("closing")}) < at_once and time.monotonic() < until:
        time.sleep(0.01)
    slow_case.engine.close()
    threads.append(threading.Thread(target=ask, args=("site0",), daemon=True))  # one that comes too late
    threads[-1].start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(ended) == 5, "an exchange still waits for workers that are gone"
    for (answer,) in ended:
        assert isinstance(answer, Failure) and answer.kind is FailureKind.UNREACHABLE
        assert answer.reason == "the engine was closed"
