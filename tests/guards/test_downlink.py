"""The way down: only what has changed, compressed, lost, repeated, resumed; and the same bits whatever travelled."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlm.errors import RecipeError
from fedlm.federation.api import run_recipe
from fedlm.federation.engines.wire import serialized_size
from fedlm.federation.rundir import RunDir
from fedlm.federation.versions import PLAN
from fedlm.messages import Failure, Reply, Request, Tensors
from tests.federation.conftest import Tiny
from tests.federation.test_kill import drive

CHANGED = "federation.downlink={send: changed}"
INT4 = "federation.downlink={send: changed, guards: [{name: int4}]}"
TOPK = "federation.downlink={send: changed, guards: [{name: topk, density: 0.2}, {name: int8}]}"


def changes(algorithm: str, *more: str) -> tuple[str, ...]:
    kind = "lora-sb" if algorithm == "fed-sb" else "lora"
    return (
        f"federation.algorithm.name={algorithm}",
        f"adapter={{kind: {kind}, rank: 4, alpha: 12.0}}",
        "training.lr=0.02",
        *more,
    )


def go(tiny: Tiny, folder: Path, *change: str) -> RunDir:
    run_recipe(tiny.recipe(*change), base=tiny.base, run_dir=folder)
    return RunDir.open(folder, write=False)


def final(run: RunDir) -> Tensors:
    checkpoint = run.load_checkpoint()
    assert checkpoint is not None
    return checkpoint.parameters


def assert_equal(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def assert_same(one: RunDir, other: RunDir) -> None:
    """The same model and the same losses in every round."""
    assert_equal(final(one), final(other))
    for x, y in zip(one.rounds(), other.rounds(), strict=True):
        assert x["loss"] == y["loss"] and x["validation"] == y["validation"]


def bytes_down(run: RunDir) -> list[int]:
    return [line["bytes_down"] for line in run.rounds()]


FEW = ("scaffold", "rolora", "fedex-lora", "hetlora")
"""State in the silos, factors in turn, deltas, ranks that differ: the rest have nothing else, and are slow together."""
MORE = ("fedavg", "ffa-lora", "fed-sb", "frlora", "flora", "ifca")


@pytest.mark.parametrize("algorithm", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_the_same_bits_in_fewer_bytes(tiny: Tiny, tmp_path: Path, algorithm: str) -> None:
    short = ("federation.rounds=3", "training.steps=1", "evaluation.max_examples=2")
    full = go(tiny, tmp_path / "full", *changes(algorithm, *short))
    changed = go(tiny, tmp_path / "changed", *changes(algorithm, *short, CHANGED))
    assert_same(full, changed)
    assert sum(bytes_down(changed)) < 0.85 * sum(bytes_down(full))


@pytest.fixture(scope="module")
def plain(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """FedAvg, the model sent in full, as it changes, and through guards."""
    folder = tmp_path_factory.mktemp("down")
    ways = {"full": (), "changed": (CHANGED,), "int4": (INT4,), "topk": (TOPK,)}
    return {
        name: go(tiny, folder / name, *changes("fedavg", "federation.keep=all", *way)) for name, way in ways.items()
    }


def test_a_model_that_was_measured_is_not_sent_again_to_be_trained(plain: dict[str, RunDir]) -> None:
    """Four silos; a round trains on the model that the round before measured, and measures one new model."""
    model = serialized_size(final(plain["full"]))
    full, changed = plain["full"].rounds(), plain["changed"].rounds()
    assert [line["bytes_down"] for line in full] == [4 * model] + [8 * model] * 4
    for line in changed[1:]:
        assert all(silo["bytes_down"] < 200 for silo in line["silos"].values()), "a plan alone"
        assert line["bytes_down"] < 4 * model + 4 * 200


def test_constants_travel_once(tiny: Tiny, tmp_path: Path) -> None:
    """Of Fed-SB's A, R and B only R changes after the first round."""
    run = go(tiny, tmp_path / "run", *changes("fed-sb", CHANGED))
    squares = {n: v for n, v in final(run).items() if ".lora_R." in n}
    small, down = serialized_size(squares), bytes_down(run)
    assert down[2] > 0 and all(4 * small < size < 4 * small + 4 * 800 for size in down[2:])
    assert down[1] > 8 * down[2]


def test_silos_that_are_seldom_asked_get_all_that_changed_since(tiny: Tiny, tmp_path: Path) -> None:
    """Two of four silos a round, one of four measures."""
    some = ("federation.sample=2", "evaluation.silos=1", "federation.rounds=6", "training.steps=1")
    for algorithm in ("rolora", "scaffold"):
        full = go(tiny, tmp_path / f"{algorithm}-full", *changes(algorithm, *some))
        changed = go(tiny, tmp_path / f"{algorithm}-changed", *changes(algorithm, CHANGED, *some))
        assert_same(full, changed)
        assert sum(bytes_down(changed)) < sum(bytes_down(full))


@pytest.mark.slow
def test_worker_processes_give_the_same(plain: dict[str, RunDir], tiny: Tiny, tmp_path: Path) -> None:
    for name, way in (("changed", CHANGED), ("int4", INT4)):
        run = go(tiny, tmp_path / name, *changes("fedavg", way, "federation.workers=2"))
        assert_same(plain[name], run)
        assert bytes_down(run) == pytest.approx(
            bytes_down(plain[name]), rel=0.01
        )  # headers are written in another order


# ---------------------------------------------------------------- guards


@pytest.mark.parametrize("name", ["int4", "topk"])
def test_silos_load_what_is_checkpointed(plain: dict[str, RunDir], name: str) -> None:
    """What all silos received last to measure is the best round's checkpoint, to train that of round 2."""
    run = plain[name]
    best, trained = (run.load_checkpoint(round_) for round_ in (run.meta["best_round"], 2))
    assert best is not None and trained is not None
    files = sorted(run.path.glob("silos/*/*/received-*.safetensors"))
    assert len(files) == 8
    for file in files:
        wanted = best if "evaluate" in file.name else trained
        assert_equal(load_file(file), wanted.parameters)
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("name", "factor"), [("int4", 6.5), ("topk", 8.0)])
def test_the_model_gets_there_in_fewer_bytes(plain: dict[str, RunDir], name: str, factor: float) -> None:
    full, guarded = plain["full"].rounds(), plain[name].rounds()
    first, last = full[0]["validation"]["loss"], full[-1]["validation"]["loss"]
    assert last < first - 0.1
    assert guarded[-1]["validation"]["loss"] == pytest.approx(last, abs=0.1 * (first - last))
    model = serialized_size(final(plain["full"]))
    for line in guarded[1:]:
        assert line["bytes_down"] < 4 * model / factor + 4 * 200


def test_what_is_lost_stays_at_the_coordinator() -> None:
    """theta^ + e is where exact steps lead: steps of any size, chains that lose much."""
    from tests.guards.test_downlink_units import downlink

    for guards in ('[{"name": "int4"}]', '[{"name": "topk", "density": 0.05}]', '[{"name": "randk", "density": 0.1}]'):
        down, draw = downlink(json.loads(guards)), torch.Generator().manual_seed(0)
        held = {"x": torch.randn(40, 50, generator=draw)}
        exact, distances = held["x"].double(), []
        for round_ in range(30):
            step = 0.01 * torch.randn(40, 50, generator=draw) + 0.01
            exact = exact + step
            held = down.rounded(held, {"x": held["x"] + step}, round_)
            _, kept = down.dump()
            torch.testing.assert_close(held["x"].double() + kept["downlink/error/x"], exact, rtol=0, atol=1e-5)
            distances.append(float((held["x"] - exact).norm()))
        assert max(distances[20:]) < 1.5 * max(distances[5:20]), "it does not run away"


def test_only_what_the_server_moved_is_rounded() -> None:
    """RoLoRA's waiting factor keeps its bits, and its error waits with it."""
    from tests.guards.test_downlink_units import downlink

    down = downlink([{"name": "int4"}])
    one = {"a": torch.randn(128), "b": torch.randn(128)}
    two = down.rounded(one, {"a": one["a"], "b": one["b"] + 0.1 * torch.randn(128)}, 0)
    assert two["a"] is one["a"] and not torch.equal(two["b"], one["b"])
    error = down.dump()[1]["downlink/error/b"].clone()
    three = down.rounded(two, {"a": two["a"] + 0.1 * torch.randn(128), "b": two["b"]}, 1)
    assert three["b"] is two["b"] and torch.equal(down.dump()[1]["downlink/error/b"], error)


# ---------------------------------------------------------------- losses and kills


def test_a_silo_that_lost_what_it_held_gets_everything(plain: dict[str, RunDir], tiny: Tiny, tmp_path: Path) -> None:
    """Removed, cut short, of another model: it is asked again in the same exchange, and its bytes tell."""
    from tests.algorithms.observed import Observed
    from tests.guards.test_downlink_units import engine_run

    damage = {1: lambda f: f.unlink(), 2: lambda f: f.write_bytes(f.read_bytes()[:1000])}

    unsynced: list[tuple[int, str]] = []

    class Forgetful(Observed):
        def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:  # noqa: ARG002
            for request in requests:
                short = request.verb == "train" and PLAN in request.tensors
                if request.silo == "site2" and short and request.round in damage:
                    for file in (tmp_path / "run" / "silos" / "site2").glob("*/received-*"):
                        damage[request.round](file)
                answer = self._silos[request.silo].handle(request)
                if isinstance(answer, Failure):
                    unsynced.append((request.round, request.silo))
                    yield answer
                    continue
                fields = {**answer.fields, "received_bytes": serialized_size(request.tensors), "sent_bytes": 0}
                yield Reply(answer.silo, answer.verb, answer.run, answer.round, 0, answer.tensors, fields)

    for name, way in (("changed", CHANGED), ("int4", INT4)):
        unsynced.clear()
        run = engine_run(Forgetful, tiny.recipe(*changes("fedavg", way)), tiny.base, tmp_path / "run")
        assert unsynced == [(1, "site2"), (2, "site2")]
        assert_same(plain[name], run)
        model = serialized_size(final(run))
        lines = run.rounds()[1:]
        assert [line["silos"]["site2"]["bytes_down"] > model for line in lines] == [False, True, True, False]
        assert not any(line["failures"] for line in lines)
        (tmp_path / "run").rename(tmp_path / name)


@pytest.mark.parametrize("way", [pytest.param(CHANGED, marks=pytest.mark.slow), INT4], ids=["changed", "int4"])
def test_three_kills(tiny: Tiny, tmp_path: Path, way: str) -> None:
    """Bits, bytes, errors and payloads are those of a run that was not killed."""
    guards = "guards=[{name: int4, error_feedback: true}]"
    assert drive(tiny.base / "recipe.yaml", tmp_path, 5, 3, *changes("fedavg", way, guards)) > 0


# ---------------------------------------------------------------- what a recipe may ask for


@pytest.mark.parametrize(
    ("algorithm", "way", "wanted"),
    [
        ("fedavg", "{guards: [{name: int4}]}", "have no effect with `send: full`"),
        ("fedavg", "{send: some}", "valid names: changed, full"),
        ("fedavg", "{send: changed, guards: [{name: int4, error_feedback: true}]}", "always gives back what it lost"),
        ("fedavg", "{send: changed, guards: [{name: lowrank}]}", "'lowrank' decodes to other bits"),
        ("fedavg", "{send: changed, guards: [{name: int4}, {name: topk}]}", "'int4' leaves nothing"),
        ("fedavg", "{send: changed, guards: [{name: zip}]}", "unknown guard 'zip'"),
        ("scaffold", "{send: changed, guards: [{name: int4}]}", "not with 'scaffold'"),
        ("fedex-lora", "{send: changed, guards: [{name: int4}]}", "not with 'fedex-lora'"),
        ("fedbuff", "{send: changed}", "its silos are at work on models of different rounds"),
    ],
)
def test_impossible_ways_down(tiny: Tiny, algorithm: str, way: str, wanted: str) -> None:
    with pytest.raises(RecipeError) as caught:
        tiny.recipe(*changes(algorithm, f"federation.downlink={way}"))
    assert wanted in str(caught.value)
