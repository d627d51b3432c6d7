"""Asynchronous federations for real: the clock, the silo's side, worker processes, kills, a log that is followed."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlm.data.federated import load_data
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe
from fedlm.federation.clock import VirtualClock, Work, seconds_per_step
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Event, Reply, Request
from fedlm.models.adapters import initial_tensors
from fedlm.recipe.speeds import SpeedSpec
from fedlm.training.plan import Plan
from tests.federation.conftest import Tiny
from tests.federation.exchanges import running_ray
from tests.federation.test_engines import OPEN
from tests.federation.test_kill import drive


def test_speeds_are_drawn_for_each_silo_with_a_heavy_tail() -> None:
    names = [f"silo{i}" for i in range(8000)]
    normal = sorted(seconds_per_step(SpeedSpec(seconds=2.0, sigma=0.7), 1, n) for n in names)
    assert normal[4000] == pytest.approx(2.0, rel=0.05)
    logs = torch.tensor(normal, dtype=torch.float64).log()
    assert float(logs.std()) == pytest.approx(0.7, rel=0.05)
    pareto = sorted(seconds_per_step(SpeedSpec(kind="pareto", seconds=3.0, shape=1.5), 1, n) for n in names)
    assert pareto[0] == pytest.approx(3.0, rel=0.01)
    for tail in (2.0, 8.0):  # P(X > tail * 3) = tail^-1.5
        assert sum(x > tail * 3.0 for x in pareto) / 8000 == pytest.approx(tail**-1.5, rel=0.2)
    assert seconds_per_step(SpeedSpec(), 0, "a") != seconds_per_step(SpeedSpec(), 0, "b")
    assert seconds_per_step(SpeedSpec(), 0, "a") != seconds_per_step(SpeedSpec(), 1, "a")
    assert seconds_per_step(SpeedSpec(kind="fixed", seconds=7.0, silos={"a": 2.5}), 0, "a") == 2.5


def test_a_training_takes_as_long_as_its_steps(tiny: Tiny) -> None:
    fixed = "federation.speeds={kind: fixed, seconds: 2.0}"
    by_steps = VirtualClock(tiny.recipe("federation.algorithm.name=fedbuff", fixed), {"a": 10, "b": 1000})
    assert (by_steps.seconds("a"), by_steps.seconds("b")) == (6.0, 6.0)
    epochs = tiny.recipe("federation.algorithm.name=fedbuff", fixed, "training.steps=null", "training.epochs=2")
    by_rows = VirtualClock(epochs, {"a": 10, "b": 1000})
    assert (by_rows.seconds("a"), by_rows.seconds("b")) == (2.0 * 5, 2.0 * 500)  # batches of 4
    plans = {"a": Plan(steps=2), "b": Plan(seconds=7.5)}  # three steps of two seconds, and no fourth
    planned = VirtualClock(epochs, {"a": 10, "b": 1000}, plans.__getitem__)
    assert (planned.seconds("a"), planned.seconds("b")) == (2.0 * 2, 2.0 * 3)
    first = by_rows.due([Work(0, "b", 0, 0.0), Work(1, "a", 0, 0.0)])
    assert first is not None and first.silo == "a" and by_rows.now == 10.0


# ---------------------------------------------------------------- the tiny model


ASYNC = ("federation.rounds=4", "federation.concurrency=3", "federation.speeds={sigma: 0.7}")
BUFFERED = "federation.algorithm={name: fedbuff, buffer: 2, weights: tokens}"
AT_ONCE = "federation.algorithm={name: fedasync}"


def ended(path: Path) -> tuple[bytes, list[Any]]:
    rounds = [
        {k: r.get(k) for k in ("arrivals", "clock", "replied", "loss", "failures")}
        for r in RunDir.open(path, write=False).rounds()
    ]
    return (path / "adapter" / "adapter_model.safetensors").read_bytes(), rounds


@pytest.fixture(scope="module", params=[BUFFERED, AT_ONCE], ids=["fedbuff", "fedasync"])
def whole(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("whole") / "run"
    recipe = tiny.recipe(*ASYNC, request.param)
    events: list[Event] = []
    assert run_recipe(recipe, base=tiny.base, run_dir=path, observe=events.append).status == "finished"
    assert {e["kind"] for e in events} >= {"round_started", "silo_started", "step", "silo_done", "round_done"}
    return request.param, path


def test_the_rate_falls_by_server_steps_and_batches_differ(tiny: Tiny, tmp_path: Path) -> None:
    """Two trainings of one silo from the same model: the same first rate, other rows; a repeat gives the stored one."""
    recipe = tiny.recipe(BUFFERED, "training.schedule=linear", "training.optimizer=sgd", "training.clip_norm=null")
    bench = Workbench(recipe, load_data(recipe, tiny.base))
    silo, start = Silo("site0", bench, tmp_path), initial_tensors(recipe)

    def trained(round_: int, dispatch: int | None) -> Reply:
        fields = {"round": round_, "rounds": 4, "accepted": -1}
        more = {} if dispatch is None else {"dispatch": dispatch}
        reply = silo.handle(Request("site0", "train", "run", round_, 0, start, {**fields, **more}))
        assert isinstance(reply, Reply), reply
        return reply

    def moved(reply: Reply) -> float:
        return float(torch.cat([t.flatten() for t in reply.tensors.values()]).norm())

    first, again = trained(0, 3), trained(0, 3)
    assert again.fields["repeated"] and all(torch.equal(first.tensors[n], again.tensors[n]) for n in first.tensors)
    other = trained(0, 7)
    assert "repeated" not in other.fields and other.fields["losses"] != first.fields["losses"]
    third = trained(3, 7)
    assert third.fields["losses"][0] != other.fields["losses"][0]
    # Rates of rounds 0 and 3 of 4 with three steps each: (12 + 11 + 10) and (3 + 2 + 1) twelfths.
    assert moved(third) / moved(other) == pytest.approx(6 / 33, rel=0.35)
    assert trained(0, None).fields["losses"] != first.fields["losses"]


@pytest.mark.slow
def test_workers_change_no_bit(whole: tuple[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    algorithm, path = whole
    run_recipe(tiny.recipe(*ASYNC, algorithm, "federation.workers=2"), base=tiny.base, run_dir=tmp_path / "two")
    assert ended(tmp_path / "two") == ended(path)
    assert any(a["staleness"] for a in told_of(path)) and len({a["silo"] for a in told_of(path)}) > 1


def told_of(path: Path) -> list[dict[str, Any]]:
    return [a for r in RunDir.open(path, write=False).rounds() for a in r.get("arrivals", [])]


def test_silos_that_do_less_answer_sooner(tiny: Tiny, tmp_path: Path) -> None:
    """One silo takes a step of three, one has time for two: the clock knows it, and so do they."""
    capacity = "federation.capacity={silos: {site0: {steps: 1}, site1: {seconds: 2.5}}}"
    fixed = "federation.speeds={kind: fixed}"
    recipe = tiny.recipe("federation.rounds=4", BUFFERED, capacity, fixed)
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    steps = {"site0": 1, "site1": 2, "site2": 3, "site3": 3}
    rounds = RunDir.open(tmp_path / "run", write=False).rounds()[1:]
    seen = [a["silo"] for a in told_of(tmp_path / "run")]
    assert seen[:3] == ["site0", "site0", "site1"] or seen[:3] == ["site0", "site1", "site0"]
    for record in rounds:
        for name, line in record["silos"].items():
            trainings = sum(a["silo"] == name for a in record["arrivals"])
            assert line["steps"] == steps[name] * trainings
            assert line.get("planned_steps") == (3 * trainings if name == "site1" else None)
    assert [r["clock"] for r in rounds] == [2.0, 3.0, 3.0, 4.0]


def test_the_log_is_followed_to_the_same_bits(whole: tuple[str, Path], tiny: Tiny, tmp_path: Path) -> None:
    """By another number of workers, from a path beside the recipe."""
    algorithm, path = whole
    log = tiny.base / f"{tmp_path.name}.jsonl"
    shutil.copy(path / "rounds.jsonl", log)
    changes = (*ASYNC[:2], algorithm, f"federation.speeds={{kind: recorded, log: {log.name}}}", "federation.workers=2")
    run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=tmp_path / "replay")
    adapter, rounds = ended(tmp_path / "replay")
    assert adapter == ended(path)[0] and [r["arrivals"] for r in rounds] == [r["arrivals"] for r in ended(path)[1]]


def test_the_update_rule_on_what_silos_really_sent(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW, rank 2 with alpha 16, unequal weights: each global model from the models and replies before it."""
    recipe, path = tiny.recipe(*ASYNC, BUFFERED, "federation.keep=all"), tmp_path / "run"
    exchange, sent = LocalEngine.exchange, dict[int, Reply]()

    def listen(self: LocalEngine, requests: Any, *more: Any) -> Any:
        asked = list(requests)
        for answer in exchange(self, asked, *more):
            if isinstance(answer, Reply) and answer.verb == "train":
                sent[asked[0].fields["dispatch"]] = answer
            yield answer

    monkeypatch.setattr(LocalEngine, "exchange", listen)
    run_recipe(recipe, base=tiny.base, run_dir=path)
    models = [initial_tensors(recipe)]
    models += [load_file(path / "checkpoints" / f"round-{n:04d}" / "model.safetensors") for n in range(4)]
    weights = set()
    for record in RunDir.open(path, write=False).rounds()[1:]:
        number, step, total = record["round"], dict[str, Any](), 0.0
        for arrival in record["arrivals"]:
            reply = sent[arrival["dispatch"]]
            weight, s = float(reply.fields["row_targets"]), (1 + arrival["staleness"]) ** -0.5
            weights.add(weight)
            total += weight
            for name, u in reply.tensors.items():
                step[name] = step.get(name, 0.0) + weight * s * u.double()
        for name, theta in models[number].items():
            wanted = theta.double() + step[name] / total
            torch.testing.assert_close(models[number + 1][name].double(), wanted, rtol=0, atol=1e-7)
            assert not torch.equal(models[number + 1][name], theta)
    assert len(weights) > 1


def run_over(kind: str, tiny: Tiny, path: Path, algorithm: str, **facts: Any) -> None:
    """A whole run over one of the engines of `test_engines`."""
    recipe = tiny.recipe(*ASYNC, algorithm)
    data = load_data(recipe, tiny.base)
    with (
        closing(new_run(recipe, path, base=tiny.base, **facts)) as directory,
        OPEN[kind](recipe, data, tiny.base, path, lambda _: None) as engine,
    ):
        assert coordinator.run(recipe, engine, directory).status == "finished"


@pytest.mark.slow
def test_over_ray(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run_over("in-process", tiny, tmp_path / "here", BUFFERED)
    with running_ray(tmp_path / "ray.log"):
        run_over("ray", tiny, tmp_path / "ray", BUFFERED)
    assert ended(tmp_path / "ray") == ended(tmp_path / "here")


def test_over_a_network_and_followed_here(tiny: Tiny, tmp_path: Path) -> None:
    """The relays' real order of answers, and the same bits by this machine's processes."""
    run_over("flare", tiny, tmp_path / "network", BUFFERED, network="hospitals")
    log = tmp_path / "network" / "rounds.jsonl"
    follow = (*ASYNC[:2], BUFFERED, f"federation.speeds={{kind: recorded, log: {log}}}")
    run_recipe(tiny.recipe(*follow), base=tiny.base, run_dir=tmp_path / "replay")
    (adapter, rounds), (wanted, log_rounds) = ended(tmp_path / "replay"), ended(tmp_path / "network")
    assert adapter == wanted and rounds == log_rounds


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [BUFFERED, AT_ONCE])
def test_kills_of_real_processes(tiny: Tiny, tmp_path: Path, algorithm: str) -> None:
    hits = drive(tiny.base / "recipe.yaml", tmp_path, 5, 2, *ASYNC, algorithm, "federation.workers=2")
    assert hits > 0
