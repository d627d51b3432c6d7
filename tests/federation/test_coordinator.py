"""The round loop against toy silos without a model: quorum, refusals, over-sampling, patience, resume, interruption."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fedlm.models.adapters
import fedlm.models.export
from fedlm.errors import RunError
from fedlm.federation.api import new_run
from fedlm.federation.coordinator import run
from fedlm.federation.records import RunResult
from fedlm.federation.rundir import RunDir
from fedlm.messages import Event, Failure, FailureKind, Reply, Request
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny

START = {"w": torch.zeros(3)}
Behave = Callable[[Request], Reply | Failure | None]


def train_reply(request: Request, update: float, **fields: Any) -> Reply:
    told = {
        "examples": 4,
        "rows": 8,
        "target_tokens": 10,
        "loss_count": 10,
        "figures": {},
        "tokens": 20,
        "loss": 2.0,
        "steps": 1,
        "seconds": 0.5,
        **fields,
    }
    told = {"tokens_per_second": 40.0, "peak_rss": 1, "dropped": 0, "cut": 0} | told
    told |= {"sent_bytes": 12, "received_bytes": 24}
    tensors = {"w": torch.full((3,), update)}
    return Reply(request.silo, request.verb, request.run, request.round, request.attempt, tensors, told)


class Toys:
    """An engine of toy silos. Silo i's update is i + 1; validation loss is (w - target)^2."""

    def __init__(self, count: int = 4, target: float = 5.0) -> None:
        self.names = [f"s{i}" for i in range(count)]
        self.target = target
        self.seen: list[Request] = []
        self.closed = 0
        self.deadlines: list[float | None] = []
        self.behave: dict[str, Behave] = {}
        self.order: Callable[[list[Request]], list[Request]] = list

    def silos(self) -> list[str]:
        return self.names

    def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
        self.deadlines.append(deadline)
        try:
            for request in self.order(list(requests)):
                self.seen.append(request)
                yield self.answer(request)
        finally:
            self.closed += 1

    def answer(self, request: Request) -> Reply | Failure:
        special = self.behave.get(f"{request.verb} {request.silo}")
        if special is not None and (answer := special(request)) is not None:
            return answer
        identity = (request.silo, request.verb, request.run, request.round, request.attempt)
        if request.verb == "hello":
            card = {"rows": {"train": 8, "validation": 2, "test": 2}, "labels": {}}
            return Reply(*identity, {}, {"card": card, "versions": {}, "protocol": 1})
        if request.verb == "evaluate":
            loss = float((request.tensors["w"] - self.target).square().mean())
            return Reply(*identity, {}, {"examples": 2, "loss_sum": loss * 10, "loss_tokens": 10, "figures": {}})
        return train_reply(request, float(self.names.index(request.silo) + 1))

    def close(self) -> None: ...

    def of(self, verb: str) -> list[Request]:
        return [r for r in self.seen if r.verb == verb]


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fedlm.models.adapters, "initial_tensors", lambda _: {n: t.clone() for n, t in START.items()})

    def save(folder: Path, tensors: Any, _: Recipe) -> None:
        folder.mkdir()
        (folder / "w.json").write_text(json.dumps(tensors["w"].tolist()))

    monkeypatch.setattr(fedlm.models.export, "save_adapter", save)


class Started:
    """A recipe, its directory, and runs of it."""

    def __init__(self, tiny: Tiny, path: Path, *changes: str) -> None:
        base = ("federation.algorithm.name=fedavg", "federation.rounds=3")
        self.recipe = tiny.recipe(*base, *changes)
        self.path = path / "run"
        self.events: list[Event] = []
        self.facts: dict[str, Any] = {}

    def run(self, engine: Toys, resume: bool = False) -> RunResult:
        directory = RunDir.open(self.path) if resume else new_run(self.recipe, self.path, **self.facts)
        try:
            return run(self.recipe, engine, directory, observe=self.events.append, resume=resume)
        finally:
            directory.close()

    def rounds(self) -> list[dict[str, Any]]:
        return RunDir.open(self.path, write=False).rounds()

    def meta(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "run.json").read_text()))

    def adapter(self) -> list[float]:
        return list(json.loads((self.path / "adapter" / "w.json").read_text()))


def test_rounds_average_validate_and_keep_the_best(tiny: Tiny, tmp_path: Path) -> None:
    """Every round adds the mean update 2.5, so w is 2.5, 5.0, 7.5: with the best loss in round 1."""
    started, toys = Started(tiny, tmp_path), Toys()
    result = started.run(toys)
    assert result.status == "finished" and result.best_round == 1 and result.best_loss == 0.0
    assert started.adapter() == [5.0] * 3
    rounds = started.rounds()
    assert [r["round"] for r in rounds] == [-1, 0, 1, 2]
    assert [r["validation"]["loss"] for r in rounds] == [25.0, 6.25, 0.0, 6.25]
    assert rounds[1]["replied"] == toys.names and rounds[1]["loss"] == 2.0
    assert rounds[1]["bytes_up"] == 48 and rounds[1]["bytes_down"] == 96 and rounds[1]["peak_pss"] > 0
    assert [p.name for p in sorted((started.path / "checkpoints").iterdir())] == ["round-0001", "round-0002"]
    evaluation = json.loads((started.path / "evaluation.json").read_text())
    assert evaluation["base"]["loss"] == 25.0 and evaluation["final"]["loss"] == 0.0
    kinds = [e["kind"] for e in started.events]
    assert kinds[0] == "run_started" and kinds[-1] == "run_done" and kinds.count("round_done") == 4
    assert json.loads((started.path / "data.json").read_text())["silos"]["s0"]["rows"]["train"] == 8


def test_order_of_answers_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    straight, turned = Toys(), Toys()
    turned.order = lambda requests: requests[::-1]
    for toys in (straight, turned):
        # Values whose fp32 sum depends on the order of the terms.
        for name, value in zip(toys.names, (1e8, 1.0, -1e8, 0.3), strict=True):
            toys.behave[f"train {name}"] = lambda r, v=value: train_reply(r, v)  # type: ignore[misc]
    one, two = Started(tiny, tmp_path / "1"), Started(tiny, tmp_path / "2")
    one.run(straight), two.run(turned)
    assert one.adapter() == two.adapter()


def failing(kind: FailureKind) -> Behave:
    return lambda r: Failure(r.silo, kind, "it is broken")


def test_below_quorum_the_round_fails_and_can_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path, "federation.quorum=0.75"), Toys()
    toys.behave["train s1"] = lambda r: failing(FailureKind.UNREACHABLE)(r) if r.round >= 1 else None
    toys.behave["train s2"] = lambda r: train_reply(r, float("nan")) if r.round >= 1 else None
    with pytest.raises(RunError, match="round 1 got 2 good updates of 4 wanted, the quorum is 3") as caught:
        started.run(toys)
    assert "s1: unreachable: it is broken" in str(caught.value) and "s2: bad_update" in str(caught.value)
    assert started.meta()["status"] == "failed" and started.meta()["rounds_done"] == 1
    toys.behave.clear()
    assert started.run(toys, resume=True).status == "finished"
    assert started.adapter() == [5.0] * 3
    # The silos are told again what was aggregated: round 0, not the failed try.
    again = [r for r in toys.of("train") if r.round == 1][-4:]
    assert [r.fields["accepted"] for r in again] == [0] * 4


def test_a_refused_update_is_a_failure_by_name_and_the_round_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path, "federation.quorum=0.5"), Toys()
    toys.behave["train s3"] = lambda r: train_reply(r, 1.0, rows=10**9)
    started.run(toys)
    record = started.rounds()[1]
    assert record["replied"] == ["s0", "s1", "s2"]
    assert [(f["silo"], f["kind"]) for f in record["failures"]] == [("s3", "bad_update")]
    assert any(e["kind"] == "silo_failed" and e["silo"] == "s3" for e in started.events)
    # s3 never contributed, so it is never told that something of it was accepted.
    assert {r.fields["accepted"] for r in toys.of("train") if r.silo == "s3"} == {-1}


@pytest.mark.parametrize(
    "fields",
    [{"loss": float("nan")}, {"tokens": -1}, {"steps": "many"}, {"seconds": float("inf")}, {"figures": {"x": [0, 1]}}],
)
def test_figures_that_cannot_be_written_down_are_refused(tiny: Tiny, tmp_path: Path, fields: dict[str, Any]) -> None:
    started, toys = Started(tiny, tmp_path, "federation.quorum=0.5"), Toys()
    toys.behave["train s3"] = lambda r: train_reply(r, 1.0, **fields)
    toys.behave["evaluate s1"] = lambda r: Reply(r.silo, r.verb, r.run, r.round, 0, {}, {"examples": float("nan")})
    started.run(toys)
    record = started.rounds()[1]
    assert [(f["silo"], f["kind"]) for f in record["failures"]] == [("s3", "bad_update")]
    assert [(f["silo"], f["kind"]) for f in record["validation"]["failures"]] == [("s1", "bad_update")]


@pytest.mark.parametrize(
    "fields",
    [
        {"examples": 10**400},
        {"loss_sum": "x"},
        {"loss_sum": 1e308},
        {"loss_tokens": None},
        {"loss_tokens": 2 * 64 + 1},  # two rows of at most 64 tokens
        {"examples": 3},
        {"figures": None},
        {"figures": {"stolen": [1.0, 1]}},
        {"figures": {"loss": [1.0]}},
        {"figures": {"loss": [float("nan"), 1]}},
        {"figures": {"loss": [1.0, 2 * 64 + 1]}},
    ],
)
def test_counts_that_a_silos_rows_do_not_allow_are_refused(tiny: Tiny, tmp_path: Path, fields: dict[str, Any]) -> None:
    started, toys = Started(tiny, tmp_path, "federation.quorum=0.5"), Toys()
    counts = {"examples": 2, "loss_sum": 1.0, "loss_tokens": 10, "figures": {}, **fields}
    toys.behave["evaluate s1"] = lambda r: Reply(r.silo, r.verb, r.run, r.round, 0, {}, counts)
    started.run(toys)
    assert [(f["silo"], f["kind"]) for f in started.rounds()[1]["validation"]["failures"]] == [("s1", "bad_update")]


@pytest.mark.parametrize("card", [None, {"rows": {}, "labels": {}}, {"rows": {"train": "x"}}])
def test_a_silo_without_a_proper_card_does_not_take_part(tiny: Tiny, tmp_path: Path, card: Any) -> None:
    toys = Toys()
    toys.behave["hello s1"] = lambda r: Reply(r.silo, r.verb, r.run, -1, 0, {}, {"card": card, "versions": {}})
    started = Started(tiny, tmp_path, "federation.quorum=0.5")
    started.run(toys)
    assert {r.silo for r in toys.of("train")} == {"s0", "s2", "s3"}
    with pytest.raises(RunError, match=r"3 of 4 silos take part, the quorum is 4 \(s1: bad_update"):
        Started(tiny, tmp_path / "all").run(toys)
    # A silo that was not there at the start is greeted again when the run is resumed.
    del toys.behave["hello s1"]
    directory = RunDir.open(started.path)
    directory.update_meta(status="interrupted")
    directory.close()
    started.run(toys, resume=True)
    assert [r.silo for r in toys.of("hello")][-1] == "s1"


def test_every_round_draws_its_own_silos(tiny: Tiny, tmp_path: Path) -> None:
    started = Started(tiny, tmp_path, "federation.sample=2", "federation.rounds=6")
    started.run(Toys())
    assert len({tuple(record["sampled"]) for record in started.rounds()[1:]}) > 2


def test_the_checkpoint_is_in_place_before_its_line_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = Started(tiny, tmp_path)

    def fail(*_: Any) -> None:
        raise RunError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "save_checkpoint", fail)
        with pytest.raises(RunError, match="disk is full"):
            started.run(Toys())
    assert [r["round"] for r in started.rounds()] == [-1]


def test_ctrl_c_while_a_round_is_committed_waits_for_the_commit(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, append = Started(tiny, tmp_path), RunDir.append_round

    def interrupted(self: RunDir, record: dict[str, Any]) -> None:
        if record["round"] == 0:
            signal.raise_signal(signal.SIGINT)
        append(self, record)

    monkeypatch.setattr(RunDir, "append_round", interrupted)
    assert started.run(Toys()).status == "interrupted"
    assert [r["round"] for r in started.rounds()] == [-1, 0]
    assert json.loads((started.path / "run.json").read_text())["rounds_done"] == 1


def test_the_round_before_stays_as_the_way_back(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path, "federation.rounds=3"), Toys()
    toys.behave["train s0"] = lambda r: failing(FailureKind.UNREACHABLE)(r) if r.round == 2 else None
    with pytest.raises(RunError, match="round 2 got 3"):
        started.run(toys)
    assert RunDir(started.path).checkpoint_rounds() == [0, 1]


def test_rows_that_are_not_used_are_told(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path), Toys()
    toys.behave["train s3"] = lambda r: train_reply(r, 4.0, dropped=5)
    started.run(toys)
    said = [e["text"] for e in started.events if e["kind"] == "phase" and "target token" in e["text"]]
    assert said == ["5 of 8 rows keep no target token and are not used at 64 tokens (in 1 silos)"]
    assert started.rounds()[1]["silos"]["s3"]["dropped"] == 5


def test_oversampling_uses_the_first_and_lets_the_rest_go(tiny: Tiny, tmp_path: Path) -> None:
    started = Started(tiny, tmp_path, "federation.sample=2", "federation.oversample=0.5", "federation.deadline=7")
    toys = Toys()
    toys.order = lambda requests: requests[::-1]
    started.run(toys)
    for record in started.rounds()[1:]:
        assert len(record["sampled"]) == 3
        assert record["replied"] == record["sampled"][1:]  # the first to answer, in canonical order
        assert record["failures"] == []
    assert len(toys.of("train")) == 6  # the third of each round was never waited for
    assert toys.closed == len(toys.deadlines)  # every exchange was closed, so engines can cancel
    assert 7.0 in toys.deadlines


def test_refused_updates_do_not_use_up_oversampled_places(tiny: Tiny, tmp_path: Path) -> None:
    started = Started(tiny, tmp_path, "federation.sample=2", "federation.oversample=1.0")
    toys = Toys()
    toys.behave["train s0"] = lambda r: train_reply(r, float("inf"))
    started.run(toys)
    assert all(r["replied"] == ["s1", "s2"] for r in started.rounds()[1:])


def test_early_stopping(tiny: Tiny, tmp_path: Path) -> None:
    started = Started(tiny, tmp_path, "federation.rounds=9", "federation.patience=2")
    result = started.run(Toys())
    assert result.rounds_done == 4 and result.best_round == 1


def test_validation_every_second_round(tiny: Tiny, tmp_path: Path) -> None:
    started = Started(tiny, tmp_path, "evaluation.every=2")
    result = started.run(Toys())
    assert [r["validation"] is None for r in started.rounds()] == [False, True, False, False]
    assert result.best_round == 1


def test_a_fixed_panel_measures(tiny: Tiny, tmp_path: Path) -> None:
    toys = Toys(10)
    Started(tiny, tmp_path, "evaluation.silos=3").run(toys)
    assert len({r.silo for r in toys.of("evaluate")}) == 3


def test_silos_without_training_rows_are_not_asked(tiny: Tiny, tmp_path: Path) -> None:
    toys = Toys()
    card = {"rows": {"train": 0, "validation": 2, "test": 0}, "labels": {}}
    toys.behave["hello s2"] = lambda r: Reply(r.silo, "hello", r.run, -1, 0, {}, {"card": card, "versions": {}})
    Started(tiny, tmp_path).run(toys)
    assert {r.silo for r in toys.of("train")} == {"s0", "s1", "s3"}
    assert "s2" in {r.silo for r in toys.of("evaluate")}


def test_another_protocol_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    toys = Toys()
    toys.behave["hello s1"] = failing(FailureKind.VERSION_MISMATCH)
    with pytest.raises(RunError, match=r"3 of 4 silos take part, the quorum is 4 \(s1: version_mismatch"):
        Started(tiny, tmp_path).run(toys)


def test_one_silo_of_another_version_stops_nobody_else(tiny: Tiny, tmp_path: Path) -> None:
    toys = Toys()
    toys.behave["hello s1"] = failing(FailureKind.VERSION_MISMATCH)
    assert Started(tiny, tmp_path, "federation.quorum=0.5").run(toys).status == "finished"
    assert {r.silo for r in toys.of("train")} == {"s0", "s2", "s3"}


@pytest.mark.parametrize("network", ["hospitals", None])
def test_an_organisation_that_comes_late_joins_at_a_round(tiny: Tiny, tmp_path: Path, network: str | None) -> None:
    """It is asked again beside the rounds; simulated silos are not, since nothing of theirs may depend on time."""
    started, toys = Started(tiny, tmp_path, "federation.quorum=0.5"), Toys()
    started.facts = {"network": network}
    toys.behave["hello s1"] = lambda r: failing(FailureKind.UNREACHABLE)(r) if len(greetings()) < 3 else None

    def greetings() -> list[Request]:
        return [r for r in toys.of("hello") if r.silo == "s1"]

    def patient(request: Request) -> None:
        """Rounds take long enough for one more greeting each."""
        until = time.monotonic() + (5 if network else 0)
        while len(greetings()) < request.round + 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)

    toys.behave["train s0"] = patient
    result = started.run(toys)
    assert result.status == "finished"
    sampled = [r["sampled"] for r in started.rounds()[1:]]
    three, four = ["s0", "s2", "s3"], toys.names
    assert sampled == ([three, three, four] if network else [three] * 3)
    cards = json.loads((started.path / "data.json").read_text())["silos"]
    assert list(cards) == (four if network else three)
    assert {r.verb for r in toys.seen if r.silo == "s1"} == ({"hello", "train", "evaluate"} if network else {"hello"})


def test_a_silo_that_did_not_answer_the_greeting_is_written_down(tiny: Tiny, tmp_path: Path) -> None:
    """Once, with the next round: with -1 of a new run, with the first further one of a resumed run."""
    started, toys = Started(tiny, tmp_path, "federation.quorum=0.5"), Toys()
    line = {"silo": "s1", "kind": "refused", "reason": "it is broken"}
    toys.behave["hello s1"] = failing(FailureKind.REFUSED)
    toys.behave["train s2"] = lambda r: failing(FailureKind.ERROR)(r) if r.round == 1 else None
    toys.behave["train s3"] = toys.behave["train s2"]
    with pytest.raises(RunError, match="round 1 got 1 good updates of 3"):
        started.run(toys)
    assert [r["failures"] for r in started.rounds()] == [[line], []]
    del toys.behave["train s2"], toys.behave["train s3"]
    assert started.run(toys, resume=True).status == "finished"
    assert [r["failures"] for r in started.rounds()] == [[line], [], [line], []]


def test_interrupted_and_resumed(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path), Toys()

    def interrupt(request: Request) -> Reply | Failure | None:
        if request.round == 1:
            raise KeyboardInterrupt
        return None

    toys.behave["train s2"] = interrupt
    result = started.run(toys)
    assert result.status == "interrupted" and result.rounds_done == 1 and "--resume" in result.message
    assert started.meta()["status"] == "interrupted"
    toys.behave.clear()
    assert started.run(toys, resume=True).status == "finished"
    assert started.adapter() == [5.0] * 3
    again = started.run(toys, resume=True)
    assert "already finished" in again.message and again.evaluation is not None


def test_put_back_to_an_earlier_checkpoint(tiny: Tiny, tmp_path: Path) -> None:
    """Round 1's checkpoint is damaged and removed as the error says; the run repeats it as a new attempt."""
    started, toys = Started(tiny, tmp_path, "federation.keep=all"), Toys()
    toys.behave["train s2"] = lambda r: failing(FailureKind.ERROR)(r) if r.round == 2 else None
    with pytest.raises(RunError):
        started.run(toys)
    last = started.path / "checkpoints" / "round-0001"
    (last / "model.safetensors").write_bytes(b"x")
    toys.behave.clear()
    with pytest.raises(RunError, match=f"remove {last}; --resume then continues after round 0"):
        started.run(toys, resume=True)
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    toys.seen.clear()
    assert started.run(toys, resume=True).status == "finished"
    assert [r["round"] for r in started.rounds()] == [-1, 0, 1, 2] and started.adapter() == [5.0] * 3
    assert [r.round for r in toys.of("train")] == [1] * 4 + [2] * 4
    assert {r.attempt for r in toys.of("train")} == {1}


def test_a_subset_of_silos(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path), Toys()
    directory = new_run(started.recipe, started.path)
    result = run(started.recipe, toys, directory, silos=["s1"], final_test=False)
    assert {r.silo for r in toys.seen} == {"s1"} and result.evaluation is None


def test_rounds_can_be_measured_on_test_rows(tiny: Tiny, tmp_path: Path) -> None:
    started, toys = Started(tiny, tmp_path), Toys()
    run(started.recipe, toys, new_run(started.recipe, started.path), final_test=False, role="test")
    assert {r.fields["role"] for r in toys.of("evaluate")} == {"test"}
    assert [r["validation"]["loss"] for r in started.rounds()] == [25.0, 6.25, 0.0, 6.25]
