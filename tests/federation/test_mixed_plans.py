"""Silos that differ: what their owners allow, what is asked of them, and plans that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import FedlmError, RecipeError, UpdateRefused
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.workbench import Workbench
from fedlm.messages import Failure, FailureKind, Request
from fedlm.models.adapters import initial_tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.schema import Recipe
from fedlm.training.plan import Plan, parse_plan
from tests.federation.conftest import Tiny
from tests.federation.mixed import SHORT, SITES, Seen, adapter, lines, same
from tests.federation.own_silos import Network, sharing_owner

# ------------------------------------------------------------------------------------------------ organisations


@pytest.fixture
def owner(tiny: Tiny, tmp_path: Path) -> Callable[..., OwnSilo]:
    """A real silo that takes the recipe's share; `policy` are lines of its owner's."""

    def make(name: str, policy: str = "") -> OwnSilo:
        return sharing_owner(name, tiny.base, tiny.recipe().model.source, tmp_path / "states", policy)

    return make


def over_network(recipe: Recipe, silos: dict[str, OwnSilo], folder: Path) -> Path:
    with using(new_run(recipe, folder)) as directory:
        coordinator.run(recipe, Network(recipe, silos, fingerprint(recipe.model)), directory)
    return folder


def test_over_a_network_owners_and_recipe_together_say_what_silos_do(
    tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path, seen: Seen
) -> None:
    """What is planned there and what one recipe says of a simulation give the same bits."""
    base = (*SHORT, "federation.algorithm.name=flora")
    recipe = tiny.recipe(*base, "federation.capacity.dealt=[{}, {rank: 3}, {layers: 1}, {}]")
    silos = {
        "site0": owner("site0", "capacity: {rank: 2}\n"),
        "site1": owner("site1", "capacity: {rank: 4, targets: [q_proj, v_proj]}\n"),
        "site2": owner("site2"),
        "site3": owner("site3", "capacity: {dtype: bfloat16}\n"),
    }
    there = over_network(recipe, silos, tmp_path / "network")
    assert seen.dtypes["site3"] == torch.bfloat16
    simulated = tiny.recipe(
        *base,
        "federation.capacity.dealt=[{rank: 2}, {rank: 3, targets: [q_proj, v_proj]}, {layers: 1}, {dtype: bfloat16}]",
    )
    run_recipe(simulated, base=tiny.base, run_dir=tmp_path / "simulated")
    assert same(adapter(there), adapter(tmp_path / "simulated"))


def test_a_real_silo_does_no_more_than_it_said_also_after_a_restart(
    tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(*SHORT, "federation.algorithm.name=flora", "federation.capacity.dealt=[{rank: 3}]")
    silo = owner("site1", "capacity: {layers: 1}\n")
    requests: list[Any] = []
    handle = silo.handle

    def kept(request: Any, *rest: Any, **more: Any) -> Any:
        requests.append(request)
        return handle(request, *rest, **more)

    monkeypatch.setattr(silo, "handle", kept)
    one = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"quorum": 0.1})})
    with using(new_run(one, tmp_path / "run")) as directory:
        coordinator.run(one, Network(one, {"site1": silo}, fingerprint(one.model)), directory)
    asked = next(r for r in requests if r.verb == "train")
    assert asked.fields["plan"] == {"rank": 3, "first_layer": 1}
    for more in ({"rank": 4, "first_layer": 1}, {"rank": 3}, None, {"rank": 3, "first_layer": 1, "targets": 7}):
        again = replace(asked, attempt=7, fields={**asked.fields, "plan": more})
        answer = owner("site1", "capacity: {layers: 1}\n").handle(again)
        assert isinstance(answer, Failure) and answer.kind is FailureKind.REFUSED, more
    narrower = owner("site1", "capacity: {layers: 1, rank: 2}\n").handle(replace(asked, attempt=8))
    assert isinstance(narrower, Failure) and "does no more than {'rank': 2, 'first_layer': 1}" in narrower.reason


def test_a_real_silo_s_time_is_real(tiny: Tiny, owner: Callable[..., OwnSilo], tmp_path: Path) -> None:
    """A thousandth of a second has room for the first step alone; an owner's limit above the recipe's adds no step."""
    recipe = tiny.recipe(*SHORT, "federation.algorithm.name=fedavg", "training.steps=5")
    limits = {"site1": "capacity: {steps: 50}\n", "site2": "capacity: {seconds: 0.001}\n"}
    silos = {s: owner(s, limits.get(s, "")) for s in SITES}
    written = lines(over_network(recipe, silos, tmp_path / "network"))
    for line in written:
        assert {s: line["silos"][s]["steps"] for s in SITES} == {s: 1 if s == "site2" else 5 for s in SITES}


def test_a_request_cannot_ask_a_real_silo_for_more_than_the_recipe(
    tiny: Tiny, owner: Callable[..., OwnSilo], seen: Seen
) -> None:
    """Of a silo without limits: its policy judged the recipe's steps, and its weights' type is its own affair."""
    silo = owner("site1", "max_steps_per_round: 2\n")
    train = request_to(silo, tiny, "training.steps=2")
    refused = silo.handle(replace(train, attempt=7, fields={**train.fields, "plan": {"rank": 4, "steps": 3}}))
    assert isinstance(refused, Failure) and "has 3 steps, the run 2" in refused.reason
    plan = {"rank": 4, "steps": 1, "dtype": "bfloat16", "micro_batch_size": 1}
    answer = silo.handle(replace(train, attempt=8, fields={**train.fields, "plan": plan}))
    assert not isinstance(answer, Failure) and answer.fields["steps"] == 1
    assert seen.dtypes["site1"] == torch.float32 and seen.specs["site1"].micro_batch_size is None
    silo = owner("site2", "max_steps_per_round: 9\n")
    train = request_to(silo, tiny, "training.steps=null", "training.epochs=1")
    answer = silo.handle(replace(train, attempt=7, fields={**train.fields, "plan": {"rank": 4, "steps": 1000}}))
    assert not isinstance(answer, Failure) and answer.fields["steps"] <= 9, "an epoch"


def request_to(silo: OwnSilo, tiny: Tiny, *changes: str) -> Request:
    """The request for the first training, of a run that the silo has agreed to."""
    recipe = tiny.recipe(*SHORT, "federation.algorithm.name=fedavg", *changes)
    network = Network(recipe, {silo.name: silo}, fingerprint(recipe.model))
    (hello,) = network.exchange([Request(silo.name, "hello", "run", -1, 0, {}, {})])
    assert not isinstance(hello, Failure), hello
    fields = {"round": 0, "rounds": 3, "accepted": -1}
    return Request(silo.name, "train", "run", 0, 0, initial_tensors(recipe), fields)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ("federation.capacity.default={rank: 1}", r"'scaffold' needs equal ranks \(.*: flexlora, flora, hetlora\)"),
        ("federation.capacity.default={rank: 9}", "above adapter.rank, 2"),
        ("federation.capacity.dealt=[{}, {steps: 9}]", r"dealt.1.steps: is above training.steps, 3"),
        ("federation.capacity.default={memory: lots}", "'lots' is no amount of memory"),
        ("federation.capacity.default={memory: 0GB}", "no amount of memory"),
        ("federation.capacity.default={laers: 1}", "unknown field, did you mean 'layers'"),
        ("federation.capacity.default={quantise: 4bit}|model.device=cpu", "4-bit weights need an NVIDIA GPU"),
        ("model.quantise=4bit|model.device=cpu", "model.quantise: 4-bit weights need an NVIDIA GPU"),
        ("federation.capacity.default={memory: 1GB}|model.device=cuda", "planned for training on a CPU"),
        ("federation.capacity.default={targets: [x]}|adapter.targets=[q_proj]", "'x' is none of adapter.targets"),
        ("federation.capacity.default={seconds: 9.0}|federation.deadline=5.0", "does not end before"),
        ("federation.capacity.default={rank: 1}|adapter={kind: ia3}", "only LoRA adapters differ"),
        ("federation.capacity.default={layers: 1}|federation.algorithm={name: lorm}", "needs the whole adapter"),
        ("federation.speeds={kind: pareto}", "speeds: has no effect with 'scaffold'"),
        (
            "federation.speeds={kind: pareto, sigma: 2.0}|federation.capacity.default={seconds: 9.0}",
            "'pareto' .*lognormal",
        ),
        (
            "federation.speeds={kind: recorded, log: x}|federation.capacity.default={seconds: 9.0}",
            "no order of answers",
        ),
        (
            "federation.algorithm={name: flora}|federation.capacity.default={memory: 2GB, quantise: 4bit}",
            "planned for training on a CPU, and 4-bit weights need a GPU",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_at_load(changes: str, told: str, tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match=told):
        tiny.recipe(*changes.split("|"))


@pytest.mark.parametrize(
    ("capacity", "told"),
    [
        ("{layers: 3}", "3 layers are to be trained of a model that has 2"),
        ("{targets: [nothing]}", "none of the adapter's"),
        ("{quantise: 4bit}", "4-bit weights need an NVIDIA GPU"),
    ],
)
def test_what_the_model_or_machine_does_not_have_is_said(capacity: str, told: str, tiny: Tiny, tmp_path: Path) -> None:
    if "4bit" in capacity and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    recipe = tiny.recipe(*SHORT, f"federation.capacity.silos={{site1: {capacity}}}")
    with pytest.raises(FedlmError, match=told):
        run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    "plan",
    [
        7,
        {"rank": 5},
        {"rank": 0},
        {"rank": True},
        {"rank": 2, "first_layer": -1},
        {"rank": 2, "targets": []},
        {"rank": 2, "targets": ["x" * 300]},
        {"rank": 2, "dtype": "float8"},
        {"rank": 2, "more": 1},
        {"rank": 2, "seconds": float("nan")},
    ],
)
def test_a_silo_s_plan_is_judged_before_it_is_believed(plan: Any, tiny: Tiny) -> None:
    with pytest.raises(UpdateRefused):
        parse_plan(plan, tiny.recipe(*SHORT, "federation.algorithm.name=flora"))


def test_plans_that_the_algorithm_cannot_use_are_refused(tiny: Tiny) -> None:
    recipe = tiny.recipe("federation.algorithm.name=lorm", "adapter.rank=4")
    assert parse_plan({"rank": 4, "steps": 1}, recipe) == Plan(rank=4, steps=1)
    for plan in ({"rank": 2}, {"first_layer": 1}, {"targets": ["q_proj"]}, {"steps": 4}):
        with pytest.raises(UpdateRefused):
            parse_plan(plan, recipe)
    full = ("adapter={kind: full}", "model.dtype=float32", "training={steps: 3}")
    cases: tuple[tuple[str, tuple[str, ...], dict[str, float], str], ...] = (
        ("fedrep", (), {"steps": 1}, "needs at least 2"),
        ("feedsign", full, {"steps": 2}, "take the same 3"),
        ("feedsign", full, {"seconds": 1.0}, "takes all its steps"),
        ("fedkseed", full, {"seconds": 1.0}, "takes all its steps"),
    )
    for name, changes, asked, told in cases:
        with pytest.raises(UpdateRefused, match=told):
            parse_plan(asked, tiny.recipe(f"federation.algorithm={{name: {name}}}", *changes))


def test_a_silo_with_a_hostile_plan_does_not_take_part(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Workbench.plan
    monkeypatch.setattr(Workbench, "plan", lambda bench, c: Plan(rank=1000) if c.steps else plan(bench, c))
    recipe = tiny.recipe(
        *SHORT,
        "federation.algorithm.name=flora",
        "federation.quorum=0.5",
        "federation.capacity.silos={site2: {steps: 1}}",
    )
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    line = lines(tmp_path / "run")[0]
    assert line["replied"] == ["site0", "site1", "site3"]
    first = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[0])
    assert [(f["silo"], f["kind"]) for f in first["failures"]] == [("site2", "bad_update")]


def test_a_silo_whose_plan_trains_nothing_does_not_count(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sorted first, so that the round's sum would begin with an empty update."""
    plan, taken = Workbench.plan, Workbench.take
    monkeypatch.setattr(Workbench, "plan", lambda bench, c: Plan(rank=4, first_layer=9) if c.steps else plan(bench, c))
    monkeypatch.setattr(Workbench, "choose", lambda _bench, parameters, _trains: dict(parameters))
    monkeypatch.setattr(Workbench, "take", lambda bench, p: {n: t for n, t in taken(bench, p).items() if ".1." in n})
    recipe = tiny.recipe(
        *SHORT,
        "federation.rounds=1",
        "federation.algorithm.name=fedavg",
        "federation.quorum=0.25",
        "federation.capacity={default: {layers: 1}, silos: {site0: {steps: 1}}}",
    )
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    (line,) = lines(tmp_path / "run")
    assert line["replied"] == ["site1", "site2", "site3"]
    assert "trains nothing" in line["failures"][0]["reason"]
