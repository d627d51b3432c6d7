"""The silo's door: allow-list, idempotent training, two-phase state, failures without text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fedlm.training.loop
from fedlm.data.federated import load_data
from fedlm.federation.silo import Silo, Workbench
from fedlm.federation.silo.door import classify
from fedlm.federation.silo.state import StateStore
from fedlm.messages import Failure, FailureKind, Reply, Request, Tensors
from fedlm.models.adapters import initial_tensors
from tests.federation.conftest import Tiny


@pytest.fixture(scope="module")
def bench(tiny: Tiny) -> Workbench:
    recipe = tiny.recipe("training.keep_optimizer=true", "training.steps=2")
    bench = Workbench(recipe, load_data(recipe, tiny.base))
    bench.load()
    return bench


@pytest.fixture(scope="module")
def broadcast(bench: Workbench) -> Tensors:
    start = initial_tensors(bench.recipe)
    return bench.algorithm.broadcast(start, bench.algorithm.init_state(start), 0)


def train(round_: int, tensors: Tensors, accepted: int = -1, attempt: int = 0) -> Request:
    fields = {"round": round_, "rounds": 9, "accepted": accepted}
    return Request("site1", "train", "run", round_, attempt, tensors, fields)


def shifted(tensors: Tensors) -> Tensors:
    return {n: t + 0.01 for n, t in tensors.items()}


def equal(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts real trainings."""
    real, calls = fedlm.training.loop.train, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(fedlm.training.loop, "train", counted)
    return calls


def reply_of(answer: Reply | Failure) -> Reply:
    assert isinstance(answer, Reply), answer
    return answer


def test_a_repeat_is_answered_without_training(
    bench: Workbench, broadcast: Tensors, tmp_path: Path, trainings: list[int]
) -> None:
    first = reply_of(Silo("site1", bench, tmp_path).handle(train(0, broadcast)))
    # A new object, as after a restart of the silo's process.
    again = reply_of(Silo("site1", bench, tmp_path).handle(train(0, broadcast)))
    assert len(trainings) == 1
    assert equal(first.tensors, again.tensors) and again.fields["loss"] == first.fields["loss"]
    later = reply_of(Silo("site1", bench, tmp_path).handle(train(0, broadcast, attempt=1)))
    assert len(trainings) == 1 and equal(first.tensors, later.tensors) and later.attempt == 1


def test_same_key_with_other_content_is_refused(bench: Workbench, broadcast: Tensors, tmp_path: Path) -> None:
    silo = Silo("site1", bench, tmp_path)
    first = reply_of(silo.handle(train(0, broadcast)))
    answer = silo.handle(train(0, shifted(broadcast)))
    assert isinstance(answer, Failure) and answer.kind is FailureKind.REFUSED
    other = reply_of(silo.handle(train(0, shifted(broadcast), attempt=1)))
    assert not equal(first.tensors, other.tensors)


def test_state_starts_from_the_accepted_round_not_the_latest(
    bench: Workbench, broadcast: Tensors, tmp_path: Path
) -> None:
    """An update that the coordinator never aggregated leaves no trace: neither variate nor optimiser moments."""
    straight = Silo("site1", bench, tmp_path / "straight")
    reply_of(straight.handle(train(0, broadcast)))
    wanted = reply_of(straight.handle(train(2, broadcast, accepted=0)))

    detour = Silo("site1", bench, tmp_path / "detour")
    reply_of(detour.handle(train(0, broadcast)))
    reply_of(detour.handle(train(1, shifted(broadcast), accepted=0)))  # refused by the coordinator, say
    got = reply_of(detour.handle(train(2, broadcast, accepted=0)))
    assert equal(got.tensors, wanted.tensors)

    taken = Silo("site1", bench, tmp_path / "taken")
    reply_of(taken.handle(train(0, broadcast)))
    reply_of(taken.handle(train(1, shifted(broadcast), accepted=0)))
    other = reply_of(taken.handle(train(2, broadcast, accepted=1)))
    assert not equal(other.tensors, wanted.tensors)


def test_two_rounds_are_kept_for_the_owner_alone(bench: Workbench, broadcast: Tensors, tmp_path: Path) -> None:
    silo = Silo("site1", bench, tmp_path)
    for round_, accepted in ((0, -1), (1, 0), (4, 1)):
        reply_of(silo.handle(train(round_, broadcast, accepted)))
    files = sorted((tmp_path / "site1" / "run").iterdir())
    assert [f.name for f in files] == ["round-0001.safetensors", "round-0004.safetensors"]
    assert all(f.stat().st_mode & 0o777 == 0o600 for f in files)
    assert (tmp_path / "site1").stat().st_mode & 0o777 == 0o700
    answer = silo.handle(train(5, broadcast, accepted=0))
    assert isinstance(answer, Failure) and "no longer holds its state of round 0" in answer.reason


def test_runs_do_not_share_state(bench: Workbench, broadcast: Tensors, tmp_path: Path, trainings: list[int]) -> None:
    silo = Silo("site1", bench, tmp_path)
    silo.handle(train(0, broadcast))
    silo.handle(Request("site1", "train", "other-run", 0, 0, broadcast, {"round": 0, "rounds": 9, "accepted": -1}))
    assert len(trainings) == 2


def test_corrupt_state_is_named(bench: Workbench, broadcast: Tensors, tmp_path: Path) -> None:
    silo = Silo("site1", bench, tmp_path)
    silo.handle(train(0, broadcast))
    file = tmp_path / "site1" / "run" / "round-0000.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    answer = silo.handle(train(1, broadcast, accepted=0))
    assert isinstance(answer, Failure) and "corrupt" in answer.reason and str(file) in answer.reason


def test_stopped_training_stores_nothing(bench: Workbench, broadcast: Tensors, tmp_path: Path) -> None:
    asked = iter([False, True, True, True])
    answer = Silo("site1", bench, tmp_path, should_stop=lambda: next(asked)).handle(train(0, broadcast))
    assert isinstance(answer, Failure) and answer.kind is FailureKind.TIMED_OUT
    assert not (tmp_path / "site1").exists()


def test_an_evaluation_that_nobody_waits_for_ends(bench: Workbench, broadcast: Tensors, tmp_path: Path) -> None:
    """It would hold up the next round's request."""
    parameters = {name: tensor for name, tensor in broadcast.items() if not name.startswith("variate")}
    request = Request("site1", "evaluate", "run", 0, 0, parameters, {"role": "validation"})
    answer = Silo("site1", bench, tmp_path, should_stop=lambda: True).handle(request)
    assert isinstance(answer, Failure) and answer.kind is FailureKind.TIMED_OUT
    assert isinstance(Silo("site1", bench, tmp_path).handle(request), Reply)


@pytest.mark.parametrize("verb", ["chat", "__class__", "handle", "evaluate"])
def test_only_allowed_verbs(bench: Workbench, tmp_path: Path, verb: str) -> None:
    silo = Silo("site1", bench, tmp_path, allow=frozenset({"hello", "train"}))
    answer = silo.handle(Request("site1", verb, "run", 0))
    assert isinstance(answer, Failure) and answer.kind is FailureKind.REFUSED


def test_hello_gives_counts_and_versions(bench: Workbench, tmp_path: Path) -> None:
    silo = Silo("site1", bench, tmp_path)
    reply = reply_of(silo.handle(Request("site1", "hello", "run", -1, fields={"protocol": 1})))
    assert sum(reply.fields["card"]["rows"].values()) == 30 and "torch" in reply.fields["versions"]
    answer = silo.handle(Request("site1", "hello", "run", -1, fields={"protocol": 2}))
    assert isinstance(answer, Failure) and answer.kind is FailureKind.VERSION_MISMATCH


def test_reasons_never_hold_text(
    bench: Workbench, broadcast: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error's message may quote a row, so it stays inside."""

    def burst(*_: object, **__: object) -> None:
        raise ValueError("the patient's name is Jane")

    monkeypatch.setattr(fedlm.training.loop, "train", burst)
    answer = Silo("site1", bench, tmp_path).handle(train(0, broadcast))
    assert isinstance(answer, Failure) and answer.kind is FailureKind.ERROR
    assert "Jane" not in answer.reason and "ValueError at test_silo.py" in answer.reason


def test_out_of_memory_is_its_own_kind() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")):
        kind, reason = classify(error)
        assert kind is FailureKind.OUT_OF_MEMORY and "micro_batch_size" in reason


def test_missing_states_are_none(tmp_path: Path) -> None:
    assert StateStore(tmp_path, "a").load("run", 0) is None


def test_state_that_lacks_or_renames_a_tensor_is_corrupt(bench: Workbench, broadcast: Tensors, tmp_path: Path) -> None:
    silo = Silo("site1", bench, tmp_path)
    silo.handle(train(0, broadcast))
    file = tmp_path / "site1" / "run" / "round-0000.safetensors"
    with safe_open(file, framework="pt") as handle:
        note = handle.metadata()
    stored = load_file(file)
    name = next(n for n in stored if n.startswith("optimizer/"))
    for damaged in ({}, {f"{name}.x": stored[name]}):
        save_file({n: t for n, t in stored.items() if n != name} | damaged, file, metadata=note)
        answer = silo.handle(train(1, broadcast, accepted=0))
        assert isinstance(answer, Failure) and "corrupt" in answer.reason and str(file) in answer.reason
