"""At a real silo's door: what is written down of each request, and limits that hold before anything is loaded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import fedlm.federation.silo.door
import fedlm.federation.silo.own
from fedlm.federation.engines.flare import start
from fedlm.federation.silo import Workbench, auditlog
from fedlm.federation.silo.own import OwnSilo
from fedlm.messages import Failure, FailureKind, Reply, Request
from fedlm.models.adapters import initial_tensors
from fedlm.recipe.load import recipe_hash
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.flare.loop import make_kit
from tests.federation.own_silos import data_file, greeting

CANARY = "xq7 canary of a patient"


@pytest.fixture
def recipe(tiny: Tiny) -> Recipe:
    made = tiny.recipe(
        "data.sources=[]", "data.partition=null", "data.at_silos=true", "federation.algorithm.name=fedavg"
    )
    return made.model_copy(update={"model": made.model.model_copy(update={"source": "/at/the/coordinator/tiny"})})


@pytest.fixture
def owner(tiny: Tiny, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., OwnSilo]:
    def make(policy: str = "") -> OwnSilo:
        rows = [json.loads(line) for line in (tiny.base / "rows.jsonl").read_text().splitlines()[:30]]
        folder = tmp_path / "owner"
        text = data_file(folder, "sources: [{path: rows.jsonl, columns: {prompt: prompt, response: response}}]\n")
        with (folder / "rows.jsonl").open("w") as file:
            for row in rows:
                file.write(json.dumps({**row, "response": f"{row['response']} {CANARY}"}) + "\n")
        (folder / "policy.yaml").write_text(f"models: {{tiny: {tiny_model_dir}}}\n{policy}")
        return OwnSilo("site1", tmp_path / "states", text, folder / "policy.yaml")

    return make


def hello(recipe: Recipe, run: str = "run", **changes: Any) -> Request:
    return Request("site1", "hello", run, -1, fields=greeting(recipe, **changes))


def train(recipe: Recipe, tiny: Tiny, round_: int = 0, attempt: int = 0, shift: float = 0.0) -> Request:
    tensors = initial_tensors(recipe.model_copy(update={"model": tiny.recipe().model}))
    tensors = {name: value + shift for name, value in tensors.items()}
    return Request("site1", "train", "run", round_, attempt, tensors, {"round": round_, "rounds": 4, "accepted": -1})


def log_of(tmp_path: Path) -> auditlog.Audit:
    return auditlog.read(tmp_path / "states" / "site1" / "_audit.jsonl")


def reason(answer: Reply | Failure) -> str:
    assert isinstance(answer, Failure), answer
    return answer.reason


def test_every_request_is_a_line(tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path) -> None:
    silo = owner("max_rounds: 4\n")
    asked = train(recipe, tiny)
    answers = [
        silo.handle(asked),
        silo.handle(hello(recipe)),
        silo.handle(asked),
        silo.handle(Request("site1", "train", "run", 7)),
        silo.handle(Request("site1", "\x1b[31mrm -rf", "../../etc", 0)),
        silo.handle(Request("site1", "pairs", "run", -1)),
        silo.handle(hello(recipe, protocol=7)),
        silo.handle(Request("site2", "train", "run", 0)),
        silo.handle(hello(tiny.recipe("federation.rounds=9", "data.at_silos=false"), "second")),
        OwnSilo("site1", tmp_path / "states", tmp_path / "owner/data.yaml", tmp_path / "owner/policy.yaml").handle(
            asked
        ),
    ]
    found = log_of(tmp_path)
    assert not found.faults and len(found.lines) == len(answers)
    assert [(line["verb"], line["outcome"], line["line"]) for line in found.lines] == [
        ("train", "refused", None),
        ("hello", "answered", None),
        ("train", "answered", None),
        ("train", "refused", None),
        ("(unknown)", "refused", "allow"),
        ("pairs", "refused", "allow"),
        ("hello", "version_mismatch", None),
        ("train", "refused", None),
        ("hello", "refused", "max_rounds"),
        ("train", "answered", None),
    ]
    assert found.lines[4]["run"] == "(improper)" and found.lines[4]["recipe"] is None
    digests = [line["recipe"] for line in found.lines]
    assert digests[1] == digests[2] == digests[9] == recipe_hash(recipe) and digests[8] != digests[1]
    numbers = sum(t.nbytes for t in asked.tensors.values())
    assert 0 < found.lines[2]["in"] - numbers <= 1024
    (reply,) = [a for a in answers[2:3] if isinstance(a, Reply)]
    assert 0 < found.lines[2]["out"] - sum(t.nbytes for t in reply.tensors.values()) <= 1024
    assert all(line["out"] == 0 for line in found.lines if line["outcome"] != "answered")


def test_no_text_and_no_number_of_rows(
    tiny: Tiny,
    recipe: Recipe,
    owner: Callable[..., OwnSilo],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A canary in every row, through good requests and bad ones: in no log, no answer, and no file that is kept in
    words; and every file of the silo is its owner's alone."""
    caplog.set_level(logging.DEBUG)
    silo, answers = owner("allow: [hello, train, evaluate, pairs, profile, score, answer]\n"), list[Reply | Failure]()
    answers.append(silo.handle(hello(recipe)))
    asked = train(recipe, tiny)
    answers.append(silo.handle(asked))
    for verb in ("train", "evaluate", "pairs", "profile", "score", "answer"):
        for fields in ({}, {"role": "validation"}, {"role": "train"}, {"accepted": "x", "items": True, "plan": []}):
            answers.append(silo.handle(Request("site1", verb, "run", 0, 5, asked.tensors, fields)))

    def quoting(*_: Any, **__: Any) -> None:
        raise ValueError(f"a library that quotes its input: {CANARY}")

    monkeypatch.setattr(fedlm.federation.silo.door, "train_round", quoting)
    answers.append(silo.handle(train(recipe, tiny, round_=1, shift=0.1)))
    assert isinstance(answers[1], Reply) and isinstance(answers[-1], Failure)
    assert "ValueError" in answers[-1].reason
    told = [a.reason if isinstance(a, Failure) else json.dumps(a.fields) for a in answers]
    assert CANARY not in "".join(told) + caplog.text + "".join(capfd.readouterr())
    for file in (tmp_path / "states").rglob("*"):
        assert file.stat().st_mode & 0o077 == 0, file
        assert file.is_dir() or CANARY.encode() not in file.read_bytes(), file
    known = {"kind", "seq", "time", "before", "hash", "verb", "run", "round", "attempt", "recipe", "in", "out"}
    for line in log_of(tmp_path).lines:
        assert line.keys() == known | {"outcome", "line"}
        assert line["out"] % 1024 == 0 or line["verb"] == "train"


def test_nothing_secret_is_on_a_command_line(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit", "silo", "site1")
    kit.startup.mkdir(parents=True)
    kit.key.write_text("PRIVATE")
    for child in (start.relay(kit), start.worker(kit, tmp_path / "data.yaml", tmp_path / "policy.yaml")):
        words = " ".join([*child.prefix, child.module, *child.arguments, *child.environment.values()])
        assert "PRIVATE" not in words and "key" not in words.replace(str(tmp_path), "")


def test_what_cannot_be_written_down_does_not_leave(
    recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silo = owner()
    assert isinstance(silo.handle(hello(recipe)), Reply)

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        assert "audit log cannot be written (its disk is full)" in reason(silo.handle(hello(recipe)))
    assert isinstance(silo.handle(hello(recipe)), Reply)
    file = tmp_path / "states/site1/_audit.jsonl"
    file.write_bytes(file.read_bytes() + b"what is this\n")
    assert "none that was written here" in reason(silo.handle(hello(recipe)))


def test_a_run_cannot_take_the_logs_place(recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path) -> None:
    silo = owner()
    for name in ("_audit.jsonl", "_spent.json", ".", "..", "a/b", "a\n", "é", "a" * 201, ""):
        assert "no proper name" in reason(silo.handle(hello(recipe, name)))
    assert not [path for path in (tmp_path / "states/site1").iterdir() if path.is_dir()]


# ------------------------------------------------------------------------------------------------ limits


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded."""
    for name in ("load", "training_tokens"):
        monkeypatch.setattr(Workbench, name, lambda *_: pytest.fail("something was loaded"))
    monkeypatch.setattr("fedlm.data.federated.load_data", lambda *_: pytest.fail("rows were read"))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("privacy: {require_masks: true}", "privacy.require_masks"),
        ("privacy: {max_epsilon: 3}", "privacy.max_epsilon"),
        ("privacy: {unit: example}", "privacy.unit"),
        ("privacy: {unit: silo}", "privacy.unit"),
        ("min_cohort: 3", "min_cohort"),
        ("max_bytes_per_round: 100", "max_bytes_per_round"),
        ("max_rank: 1", "max_rank"),
    ],
)
def test_limits_of_a_recipe(
    recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, policy: str, line: str
) -> None:
    assert line in reason(owner(f"{policy}\n").handle(hello(recipe)))
    assert log_of(tmp_path).lines[-1]["line"] == line


def test_quiet_hours_at_the_door(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silo = owner("quiet_hours: ['07:00-19:00 Mon-Fri']\n")
    moments = [datetime(2026, 1, 5, 6, tzinfo=UTC)]
    monkeypatch.setattr(fedlm.federation.silo.own, "now", lambda: moments[-1])
    assert isinstance(silo.handle(hello(recipe)), Reply)
    moments.append(datetime(2026, 1, 5, 9, tzinfo=UTC))
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "load", lambda *_: pytest.fail("something was loaded"))
        for request in (hello(recipe), train(recipe, tiny)):
            assert "answers again at 2026-01-05 19:00 UTC" in reason(silo.handle(request))
    assert log_of(tmp_path).lines[-1]["line"] == "quiet_hours"
    moments.append(datetime(2026, 1, 5, 19, tzinfo=UTC))
    assert isinstance(silo.handle(train(recipe, tiny)), Reply)


def test_rounds_of_a_day_at_the_door(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silo, moments = owner("max_rounds_per_day: 1\n"), [datetime(2026, 1, 5, 23, 50, tzinfo=UTC)]
    monkeypatch.setattr(fedlm.federation.silo.own, "now", lambda: moments[-1])
    silo.handle(hello(recipe))
    assert isinstance(silo.handle(train(recipe, tiny)), Reply)
    assert isinstance(silo.handle(train(recipe, tiny)), Reply)  # the stored one again
    silo = owner("max_rounds_per_day: 1\n")  # a restart forgets nothing
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "training_tokens", lambda *_: pytest.fail("something was loaded"))
        assert "max_rounds_per_day" in reason(silo.handle(train(recipe, tiny, attempt=1, shift=0.1)))
    assert log_of(tmp_path).lines[-1]["line"] == "max_rounds_per_day"
    moments.append(datetime(2026, 1, 6, 0, 10, tzinfo=UTC))
    assert isinstance(silo.handle(train(recipe, tiny, attempt=1, shift=0.1)), Reply)


def test_bytes_of_a_round_are_withheld_beyond_the_limit(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the shapes promised less: here as if the method's update were unknown beforehand."""
    numbers = sum(t.nbytes for t in train(recipe, tiny).tensors.values())
    silo = owner(f"max_bytes_per_round: {numbers + 2048}\n")
    assert isinstance(silo.handle(hello(recipe)), Reply)
    assert isinstance(silo.handle(train(recipe, tiny)), Reply)
    assert isinstance(silo.handle(train(recipe, tiny)), Reply)
    refused = silo.handle(train(recipe, tiny, attempt=1, shift=0.1))
    assert "max_bytes_per_round" in reason(refused) and isinstance(refused, Failure)
    assert refused.kind is FailureKind.REFUSED and log_of(tmp_path).lines[-1]["out"] == 0
    monkeypatch.setattr(fedlm.federation.silo.own, "check_bytes", lambda *_: None)
    small = owner("max_bytes_per_round: 3000\n")
    assert isinstance(small.handle(hello(recipe, "other")), Reply)
    asked = train(recipe, tiny)
    refused = small.handle(Request("site1", "train", "other", 0, 0, asked.tensors, asked.fields))
    assert "max_bytes_per_round" in reason(refused)
