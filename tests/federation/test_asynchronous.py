"""Asynchronous rounds against toy silos: order, staleness, failures, resuming, networks and recorded logs."""

from __future__ import annotations

import heapq
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import RunError
from fedlm.federation import asynchronous
from fedlm.federation.folding import Waiting
from fedlm.messages import Event, Failure, FailureKind, Reply, Request, Stop
from tests.federation.conftest import Tiny
from tests.federation.test_coordinator import Started, Toys, no_model, train_reply  # noqa: F401  (a fixture)

SPEEDS = "federation.speeds={kind: fixed, silos: {s0: 1.0, s1: 1.37, s2: 2.91, s3: 10.53}}"
TARGETS = (4.0, -2.0, 1.0, 7.0)
STEPS = 3  # of the tiny recipe


class Paced(Toys):
    """Toys that take real time and can be stopped. Silo i moves w a tenth of the way to TARGETS[i]."""

    def __init__(self, count: int = 4, delay: float = 0.0, seed: int = 0) -> None:
        super().__init__(count)
        self.delay, self.draw = delay, random.Random(seed)
        self.slow: dict[str, float] = {}
        self.late: set[str] = set()
        """Silos that answer two rounds late, however long that takes."""
        self.stopped: list[Request] = []
        self.working: list[str] = []
        self.most = 0
        self.lock = threading.Lock()

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        if stop is None:
            yield from super().exchange(requests, deadline)
            return
        (request,) = requests
        with self.lock:
            assert request.silo not in self.working, "a silo works on one thing at a time"
            self.working.append(request.silo)
            self.most = max(self.most, len(self.working))
            self.seen.append(request)
            wait = self.draw.random() * self.delay + self.slow.get(request.silo, 0.0)
        ended = threading.Event()

        def end(stopped: bool) -> None:
            with self.lock:
                if not ended.is_set():
                    self.working.remove(request.silo)
                    self.stopped += [request] if stopped else []
                    ended.set()

        stop.then(lambda: end(stopped=True))
        ended.wait(wait)
        while request.silo in self.late and self.newest() < request.round + 2 and not stop.called:
            ended.wait(0.01)
        end(stopped=False)
        if stop.called:
            yield Failure(request.silo, FailureKind.TIMED_OUT, "stopped")
        else:
            yield self.answer(request)

    def newest(self) -> int:
        return max(request.round for request in self.seen)

    def answer(self, request: Request) -> Reply | Failure:
        special = self.behave.get(f"{request.verb} {request.silo}")
        if request.verb != "train" or (special is not None and special(request) is not None):
            return super().answer(request)
        change = 0.1 * (TARGETS[self.names.index(request.silo)] - float(request.tensors["w"][0]))
        return train_reply(request, change)


def simulate(name: str, rounds: int, buffer: int) -> tuple[list[tuple[str, int, int]], list[float], list[float]]:
    """The same federation as an event queue in float64: answers (silo, round, staleness), clock and w by round."""
    seconds = {"s0": 1.0, "s1": 1.37, "s2": 2.91, "s3": 10.53}
    queue = [(STEPS * each, silo, 0) for silo, each in seconds.items()]
    heapq.heapify(queue)
    w, clocks, answers, held = [0.0], [], [], []
    while len(w) <= rounds:
        now, silo, version = heapq.heappop(queue)
        tau = len(w) - 1 - version
        answers.append((silo, version, tau))
        update = 0.1 * (TARGETS[int(silo[1])] - w[version])
        if name == "fedasync":
            mixed = 0.6 * (1 + tau) ** -0.5
            w.append((1 - mixed) * w[-1] + mixed * (w[version] + update))
        else:
            held.append(update * (1 + tau) ** -0.5)
            if len(held) == buffer:
                w.append(w[-1] + sum(held) / buffer)
                held = []
        clocks += [now] if len(w) - 1 > len(clocks) else []
        heapq.heappush(queue, (now + STEPS * seconds[silo], silo, len(w) - 1))
    return answers, clocks, w


def begun(tiny: Tiny, path: Path, name: str = "fedasync", *changes: str) -> Started:
    base = [f"federation.algorithm.name={name}", SPEEDS]
    if name == "fedbuff":
        base += ["federation.algorithm.buffer=3", "federation.algorithm.weights=equal"]
    return Started(tiny, path, *base, *changes)


def told(started: Started) -> list[dict[str, Any]]:
    return [arrival for record in started.rounds() for arrival in record.get("arrivals", [])]


@pytest.mark.parametrize("name, rounds", [("fedasync", 30), ("fedbuff", 12)])
def test_the_virtual_clock_is_an_event_queue(tiny: Tiny, tmp_path: Path, name: str, rounds: int) -> None:
    started, toys = begun(tiny, tmp_path, name, f"federation.rounds={rounds}"), Paced()
    started.run(toys)
    answers, clocks, w = simulate(name, rounds, 3)
    assert [(a["silo"], a["round"], a["staleness"]) for a in told(started)] == answers
    assert {tau for _, _, tau in answers} >= {0, 1, 2} and max(tau for *_, tau in answers) > 5 - (name == "fedbuff")
    assert [r["clock"] for r in started.rounds()[1:]] == pytest.approx(clocks, rel=1e-12)
    losses = [r["validation"]["loss"] for r in started.rounds()]
    assert losses == pytest.approx([(value - 5.0) ** 2 for value in w], rel=1e-5)
    # What silos load is the model of the round that their answer is counted from.
    for request in toys.of("train"):
        assert float(request.tensors["w"][2]) == pytest.approx(w[request.round], abs=1e-5)
        assert request.fields["round"] == request.round and request.fields["accepted"] == -1
    numbers = [request.fields["dispatch"] for request in toys.of("train")]
    assert sorted(numbers) == list(range(len(answers) + 3))  # three were still at work at the end


def test_how_long_silos_really_take_changes_nothing(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = ("federation.rounds=12", "federation.concurrency=2")
    ends = []
    for number, toys in enumerate((Paced(), Paced(delay=0.02), Paced(delay=0.02, seed=1))):
        if number == 2:  # what is early waits on disk
            monkeypatch.setattr(asynchronous, "Waiting", partial(Waiting, held_bytes=0))
        started = begun(tiny, tmp_path / str(number), "fedbuff", *changes)
        started.run(toys)
        assert not list((started.path / "spool").iterdir())
        assert toys.most <= 2 and not toys.working
        ends.append((started.adapter(), told(started), [r["clock"] for r in started.rounds()[1:]]))
        assert len({a["silo"] for a in told(started)}) == 4
    assert ends[0] == ends[1] == ends[2]


def test_work_beyond_the_bound_is_stopped_and_the_silo_gets_new(tiny: Tiny, tmp_path: Path) -> None:
    started = begun(tiny, tmp_path, "fedasync", "federation.rounds=40", "federation.algorithm.max_staleness=6")
    toys, kept = Paced(), [0]
    toys.slow["s3"] = 30.0  # it never answers in time, as the clock also says

    def count(event: Event) -> None:
        if event["kind"] == "round_done":
            kept.append(len(list((started.path / "checkpoints").iterdir())))

    started.events = _Told(count)
    before = time.monotonic()
    started.run(toys)
    assert time.monotonic() - before < 25, "nobody waits for a silo whose work no longer counts"
    arrivals, late = told(started), [a for a in told(started) if a["failure"]]
    assert {a["silo"] for a in late} == {"s3"} and {a["failure"] for a in late} == {"stale"}
    assert [a["round"] for a in late] == [0, 7, 14, 21, 28] and {a["staleness"] for a in late} == {7}
    assert all(a["staleness"] <= 6 for a in arrivals if not a["failure"])
    assert [r.round for r in toys.stopped] == [0, 7, 14, 21, 28, 35]  # the last at the end of the run
    failures = [f for r in started.rounds() for f in r["failures"]]
    assert failures[0]["reason"] == "staleness beyond the bound: 7 server steps, 6 allowed" and len(failures) == 5
    assert 3 < max(kept) <= 4 + 4, "models that work under way started from are kept, and no others"


class _Told(list[Event]):
    """Events that something looks at."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.look = look

    def append(self, event: Event) -> None:
        self.look(event)


def test_a_silo_that_fails_is_replaced_and_asked_again_in_the_next_round(tiny: Tiny, tmp_path: Path) -> None:
    started = begun(
        tiny, tmp_path, "fedbuff", "federation.rounds=8", "federation.concurrency=2", "federation.quorum=0.5"
    )
    toys = Paced()
    toys.behave["train s1"] = lambda r: Failure(r.silo, FailureKind.UNREACHABLE, "its worker died")
    toys.behave["train s2"] = lambda r: train_reply(r, float("nan"))
    assert started.run(toys).status == "finished"
    failed = Counter((a["silo"], a["failure"]) for a in told(started) if a["failure"])
    assert set(failed) == {("s1", "unreachable"), ("s2", "bad_update")} and min(failed.values()) > 1
    for record in started.rounds()[1:]:
        assert Counter(f["silo"] for f in record["failures"]).most_common(1)[0][1] == 1 if record["failures"] else True
        assert set(record["replied"]) <= {"s0", "s3"} and len(record["arrivals"]) == 3 + len(record["failures"])
        assert record["sampled"] == sorted({a["silo"] for a in record["arrivals"]})
    # Two answers of one silo in a round stand as one line, with the sum of what they cost.
    assert any(line["tokens"] == 40 for r in started.rounds()[1:] for line in r["silos"].values())


def test_too_few_silos_alive(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = begun(tiny, tmp_path, "fedasync", "federation.rounds=30", "federation.quorum=0.75"), Paced()
    tries = Counter[str]()

    def thrice(request: Request) -> Failure | None:
        tries[request.silo] += 1
        return Failure(request.silo, FailureKind.ERROR, "broken") if tries[request.silo] <= 3 else None

    toys.behave["train s1"] = thrice
    toys.behave["train s2"] = lambda r: Failure(r.silo, FailureKind.ERROR, "gone") if r.round > 15 else None
    started.run(toys)  # s1 is well again before s2 breaks
    assert started.rounds()[-1]["round"] == 29
    started = begun(tiny, tmp_path / "2", "fedasync", "federation.rounds=30", "federation.quorum=0.75")
    toys.behave["train s1"] = lambda r: Failure(r.silo, FailureKind.ERROR, "broken")
    with pytest.raises(RunError, match="2 of 4 silos are alive, the quorum is 3: s1: error: broken; s2: error: gone"):
        started.run(toys)
    assert started.meta()["status"] == "failed" and not toys.working
    toys.behave.clear()
    assert started.run(toys, resume=True).status == "finished"


def test_a_deadline_is_counted_on_the_clock(tiny: Tiny, tmp_path: Path) -> None:
    started = begun(
        tiny, tmp_path, "fedasync", "federation.rounds=20", "federation.deadline=5", "federation.quorum=0.5"
    )
    toys = Paced()
    started.run(toys)
    assert {r.silo for r in toys.of("train")} == {"s0", "s1"}, "who cannot be in time need not be asked"
    late = [a for a in told(started) if a["failure"]]
    assert {(a["silo"], a["failure"]) for a in late} == {("s2", "timed_out"), ("s3", "timed_out")}


class Killed(BaseException):
    """What no part of a run handles."""


@pytest.mark.parametrize("name", ["fedasync", "fedbuff"])
def test_resumed_anywhere_it_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path, name: str) -> None:
    rounds = {"fedasync": 8, "fedbuff": 4}[name]
    changes = (f"federation.rounds={rounds}", "federation.concurrency=3", "federation.algorithm.max_staleness=4")
    whole, asked = begun(tiny, tmp_path / "whole", name, *changes), Paced()
    whole.run(asked)
    sent = {r.fields["dispatch"]: r for r in asked.of("train")}
    for kill in range(0, len(sent) - 3, 3):
        started, toys = begun(tiny, tmp_path / str(kill), name, *changes), Paced(delay=0.01, seed=kill)

        def die(request: Request, kill: int = kill) -> None:
            if request.fields["dispatch"] == kill:
                raise Killed

        for silo in toys.names:
            toys.behave[f"train {silo}"] = die
        with pytest.raises(Killed):
            started.run(toys)
        assert started.meta()["status"] == "running"  # as a kill leaves it
        toys.behave.clear()
        started.run(toys, resume=True)
        assert started.adapter() == whole.adapter() and told(started) == told(whole)
        for request in toys.of("train"):
            same = sent[request.fields["dispatch"]]
            assert (request.silo, request.round, request.fields) == (same.silo, same.round, same.fields)
            assert torch.equal(request.tensors["w"], same.tensors["w"])
        assert {r.attempt for r in toys.of("train")} == {0, 1}, "what is asked again is another attempt"


def test_an_earlier_checkpoint_has_all_that_was_under_way(tiny: Tiny, tmp_path: Path) -> None:
    """The last checkpoint is damaged and removed as the error says: the run goes on from the one before."""
    changes = ("federation.rounds=18", "federation.algorithm.max_staleness=9")
    whole = begun(tiny, tmp_path / "whole", "fedasync", *changes)
    whole.run(Paced())
    started, toys = begun(tiny, tmp_path, "fedasync", *changes), Paced()
    answers, _, _ = simulate("fedasync", 18, 1)
    # In this round an old model is used for the last time.
    number = next(n for n, (_, version, tau) in enumerate(answers) if n > 6 and tau > 3 and version > 0)

    def die(request: Request) -> None:
        if request.round == number + 1:
            raise Killed

    toys.behave["evaluate s0"] = die
    with pytest.raises(Killed):
        started.run(toys)
    last = max((started.path / "checkpoints").iterdir())
    assert last.name == f"round-{number:04d}"
    (last / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match=f"remove {last}; --resume then continues"):
        started.run(toys, resume=True)
    for file in [*last.iterdir(), last]:
        file.unlink() if file.is_file() else file.rmdir()
    toys.behave.clear()
    started.run(toys, resume=True)
    assert started.adapter() == whole.adapter() and told(started) == told(whole)


def networked(tiny: Tiny, path: Path, *changes: str) -> tuple[Started, Paced]:
    """A run whose answers count as they really come; s3 is late, s1 fails now and then."""
    base = ("federation.rounds=10", "federation.quorum=0.5", "federation.algorithm.max_staleness=4")
    started, toys = begun(tiny, path, "fedbuff", *base, *changes), Paced(delay=0.02, seed=3)
    started.facts = {"network": "hospitals"}
    toys.late = {"s3"}
    toys.behave["train s1"] = lambda r: (
        Failure(r.silo, FailureKind.UNREACHABLE, "away") if r.round == 0 or r.fields["dispatch"] % 3 == 0 else None
    )
    started.run(toys)
    return started, toys


def test_a_networks_order_is_recorded_and_followed_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    recorded, asked = networked(tiny, tmp_path / "network")
    arrivals = told(recorded)
    assert any(a["failure"] == "unreachable" for a in arrivals) and any(a["staleness"] > 1 for a in arrivals)
    assert all(r["clock"] is None for r in recorded.rounds()[1:])
    order = [a["dispatch"] for a in arrivals]
    assert order != sorted(order), "silos are not equally fast"

    follow = f"federation.speeds={{kind: recorded, log: {recorded.path}/rounds.jsonl}}"
    replay = Started(tiny, tmp_path / "replay", *_of(recorded), follow)
    toys = Paced(delay=0.01)
    replay.run(toys)
    assert replay.adapter() == recorded.adapter() and told(replay) == arrivals
    good = {a["dispatch"] for a in arrivals if not a["failure"]}
    assert {r.fields["dispatch"] for r in toys.of("train")} == good, "what did not count is not trained"
    sent = {r.fields["dispatch"]: r for r in asked.of("train")}
    assert all(torch.equal(r.tensors["w"], sent[r.fields["dispatch"]].tensors["w"]) for r in toys.of("train"))


def _of(started: Started) -> list[str]:
    spec = started.recipe.federation
    return [
        "federation.algorithm={name: fedbuff, buffer: 3, weights: equal, max_staleness: 4}",
        f"federation.rounds={spec.rounds}",
        f"federation.quorum={spec.quorum}",
    ]


def test_a_replay_that_is_interrupted(tiny: Tiny, tmp_path: Path) -> None:
    recorded, _ = networked(tiny, tmp_path / "network")
    follow = f"federation.speeds={{kind: recorded, log: {recorded.path}/rounds.jsonl}}"
    replay, toys = Started(tiny, tmp_path / "replay", *_of(recorded), follow), Paced()
    last = max(a["dispatch"] for a in told(recorded) if not a["failure"])

    def die(request: Request) -> None:
        if request.fields["dispatch"] == last:
            raise Killed

    for silo in toys.names:
        toys.behave[f"train {silo}"] = die
    with pytest.raises(Killed):
        replay.run(toys)
    toys.behave.clear()
    replay.run(toys, resume=True)
    assert replay.adapter() == recorded.adapter() and told(replay) == told(recorded)


def test_a_log_that_does_not_fit(tiny: Tiny, tmp_path: Path) -> None:
    recorded, _ = networked(tiny, tmp_path / "network")
    log = recorded.path / "rounds.jsonl"

    def follow(name: str, file: Path, *changes: str) -> None:
        speeds = f"federation.speeds={{kind: recorded, log: {file}}}"
        Started(tiny, tmp_path / name, *_of(recorded), speeds, *changes).run(Paced())

    with pytest.raises(RunError, match=r"the log does not fit this run: it ends after \d+ answers") as caught:
        follow("longer", log, "federation.rounds=11")
    assert "but for speeds and workers" in str(caught.value)
    with pytest.raises(RunError, match="comes where this run has not asked for it"):
        follow("other buffer", log, "federation.algorithm.buffer=5")
    with pytest.raises(RunError, match="cannot be read"):
        follow("missing", tmp_path / "nowhere")
    for name, text, said in (
        ("torn", '{"arrivals": [{"dispatch": 1', "damaged"),
        ("other", '{"arrivals": [{"dispatch": 1, "silo": "s0", "round": 0, "failure": "bored"}]}', "damaged"),
        ("synchronous", json.dumps({"round": 0}), "holds no order of answers"),
        ("strangers", '{"arrivals": [{"dispatch": 0, "silo": "x", "round": 0, "failure": null}]}', "the silo 'x'"),
    ):
        (tmp_path / f"{name}.jsonl").write_text(text + "\n")
        with pytest.raises(RunError, match=said):
            follow(name, tmp_path / f"{name}.jsonl")


def test_what_cannot_be_is_said_before_anything_is_trained(tiny: Tiny, tmp_path: Path) -> None:
    toys = Paced()
    with pytest.raises(RunError, match=r"speeds.silos: there is no silo 's9'.*valid names: s0, s1"):
        begun(tiny, tmp_path / "1", "fedasync", "federation.speeds={silos: {s9: 1.0}}").run(toys)
    with pytest.raises(RunError, match=r"with 4 silos at work at once .* 3 steps late, and 2 are allowed"):
        begun(tiny, tmp_path / "2", "fedasync", "federation.algorithm.max_staleness=2").run(toys)
    assert not toys.of("train")


def test_a_fault_of_the_engine_ends_the_run(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = begun(tiny, tmp_path, "fedasync", "federation.rounds=30"), Paced()

    def break_down(request: Request) -> None:
        if request.round >= 4:
            raise RunError("the disk is full")

    toys.behave["train s0"] = break_down
    with pytest.raises(RunError, match="the disk is full"):
        started.run(toys)
    assert started.meta()["status"] == "failed" and started.meta()["rounds_done"] >= 3


def test_what_no_longer_counts_leaves_memory_and_disk(tmp_path: Path) -> None:
    for room in (0, 1000):
        waiting = Waiting(tmp_path, held_bytes=room)
        waiting.put("7", 7, {"w": torch.zeros(200)}, ready=False)
        assert len(list(tmp_path.iterdir())) == (room == 0)
        for _ in range(2):  # the second time there is none
            waiting.drop("7")
        assert not list(tmp_path.iterdir()) and not waiting.held and waiting.room == room
