"""Silos that differ: in rank, in what they train of the adapter, in steps and time, in their weights' type."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlm.algorithms.base import Algorithm, Place
from fedlm.errors import FedlmError, RecipeError, UpdateRefused
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.conversations import Conversations
from fedlm.federation.silo.own import OwnSilo
from fedlm.federation.silo.workbench import Workbench
from fedlm.files import read_tensors
from fedlm.messages import Failure, FailureKind, Request, Tensors
from fedlm.models.adapters import initial_tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.schema import Recipe
from fedlm.training import loop
from fedlm.training.footprint import shape_of
from fedlm.training.plan import MARGIN, Plan, parse_plan, predict
from tests.federation.conftest import Tiny
from tests.federation.own_silos import Network, data_file

SITES = [f"site{n}" for n in range(4)]
SHORT = ("federation.rounds=3", "training.steps=2", "adapter.rank=4", "data.split.test=0")


class Seen:
    """What every training of a run began with and on what, and every update that was folded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: dict[tuple[str, int], dict[str, torch.Size]] = {}
        """By silo and round: the trained parameters' shapes."""
        self.loaded: dict[tuple[str, int], dict[str, Tensor]] = {}
        """By silo and round: every parameter of the adapter as training began."""
        self.dtypes: dict[str, torch.dtype] = {}
        self.specs: dict[str, Any] = {}
        self.updates: dict[tuple[str, int], tuple[Tensors, float]] = {}
        train, fold = loop.train, Algorithm.fold

        def watched(model: Any, parameters: Any, data: Any, spec: Any, window: Any, **rest: Any) -> Any:
            from fedlm.models.adapters import adapter_parameters

            key = (rest["silo"], window.round)
            self.trained[key] = {name: p.shape for name, p in parameters.items()}
            self.loaded[key] = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
            self.dtypes[rest["silo"]] = model.get_input_embeddings().weight.dtype
            self.specs[rest["silo"]] = spec
            return train(model, parameters, data, spec, window, **rest)

        def folded(of: Algorithm, sums: Any, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
            self.updates[place.silo, place.round] = ({n: t.clone() for n, t in update.items()}, weight)
            fold(of, sums, update, weight, place)

        monkeypatch.setattr(loop, "train", watched)
        monkeypatch.setattr(Algorithm, "fold", folded)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]


def adapter(folder: Path) -> Tensors:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def model_after(folder: Path, round_: int) -> Tensors:
    return read_tensors(folder / "checkpoints" / f"round-{round_:04d}" / "model.safetensors")


# ------------------------------------------------------------------------------------------------ ranks


@pytest.mark.parametrize("algorithm", ["flexlora", "flora", "hetlora"])
def test_every_silo_loads_trains_and_sends_its_own_rank(algorithm: str, tiny: Tiny, tmp_path: Path, seen: Seen) -> None:
    """Unequal rows, AdamW, alpha 16 with ranks 4, 1, 3 and 2; site3 is named, the others are dealt to."""
    recipe = tiny.recipe(
        *SHORT,
        f"federation.algorithm.name={algorithm}",
        "federation.capacity.dealt=[{}, {rank: 1}, {rank: 3}]",
        "federation.capacity.silos={site3: {rank: 2}}",
    )
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    ranks = {"site0": 4, "site1": 1, "site2": 3, "site3": 2}
    for (silo, _), shapes in seen.trained.items():
        assert {shape[0] for name, shape in shapes.items() if ".lora_A." in name} == {ranks[silo]}
        assert {shape[1] for name, shape in shapes.items() if ".lora_B." in name} == {ranks[silo]}
    assert len(seen.trained) == 12
    written = lines(tmp_path / "run")
    if algorithm == "flora":
        assert all(line["aggregation"]["aggregation_error"] < 1e-5 for line in written)
    else:
        assert set(written[-1]["aggregation"]["error_by_rank"]) == {"1", "2", "3", "4"}
    cards = json.loads((tmp_path / "run" / "data.json").read_text())["silos"]
    assert {name: card["plan"]["rank"] for name, card in cards.items() if "plan" in card} | {"site0": 4} == ranks


def test_what_all_silos_load_of_a_smaller_rank_is_the_best_part_of_the_global_model(
    tiny: Tiny, tmp_path: Path, seen: Seen
) -> None:
    """FlexLoRA's silo of rank 1 begins round 2 with the best approximation of rank 1 to what rank 4 begins with."""
    recipe = tiny.recipe(*SHORT, "federation.algorithm.name=flexlora", "federation.capacity.dealt=[{}, {rank: 1}]")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    large, small = seen.loaded["site0", 2], seen.loaded["site1", 2]
    for name in (n for n in large if ".lora_A." in n):
        other = name.replace(".lora_A.", ".lora_B.")
        whole = 16 / 4 * large[other].double() @ large[name].double()
        part = 16 / 1 * small[other].double() @ small[name].double()
        u, s, v = torch.linalg.svd(whole)
        torch.testing.assert_close(part, s[0] * u[:, :1] @ v[:1], rtol=1e-4, atol=1e-6 * float(s[0]))


# ------------------------------------------------------------------------------------------------ parts

DEAL = "federation.capacity.dealt=[{}, {layers: 1}, {targets: [q_proj, up_proj]}, {layers: 1, targets: [v_proj]}]"


def belongs(silo: str, name: str) -> bool:
    last, named = ".layers.1." in name, name.rsplit(".", 3)[1]
    return {
        "site0": True,
        "site1": last,
        "site2": named in ("q_proj", "up_proj"),
        "site3": last and named == "v_proj",
    }[silo]


def test_a_tensor_s_mean_is_over_the_silos_that_trained_it(tiny: Tiny, tmp_path: Path, seen: Seen) -> None:
    recipe = tiny.recipe(*SHORT, "federation.algorithm.name=fedavg", "federation.keep=all", DEAL)
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    names = set(initial_tensors(recipe))
    weights = {silo: weight for (silo, _), (_, weight) in seen.updates.items()}
    assert len(set(weights.values())) > 1
    for silo in SITES:
        for round_ in range(3):
            assert set(seen.trained[silo, round_]) == {n for n in names if belongs(silo, n)}
            assert set(seen.updates[silo, round_][0]) == {n for n in names if belongs(silo, n)}
    before = initial_tensors(recipe)
    for round_ in range(3):
        after = model_after(tmp_path / "run", round_)
        for name in names:
            trained = [silo for silo in SITES if belongs(silo, name)]
            total = sum(weights[silo] for silo in trained)
            mean = sum(weights[s] / total * seen.updates[s, round_][0][name].double() for s in trained)
            torch.testing.assert_close(after[name].double(), before[name].double() + mean, rtol=1e-5, atol=1e-7)
        before = after
        if round_ < 2:  # every silo loads all of the global model, trained or not
            for silo in SITES:
                assert same(seen.loaded[silo, round_ + 1], after)


@pytest.mark.parametrize(
    "algorithm",
    [
        *(
            "scaffold",
            "fedprox",
            "feddyn",
            "fedadam",
            "fedit",
            "ffa-lora",
            "rolora",
            "fedrot-lora",
            "fedex-lora",
            "fednova",
        ),
        *("flora", "flexlora", "hetlora"),
    ],
)
def test_layers_that_no_silo_trains_stay_with_every_algorithm(algorithm: str, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        *SHORT,
        f"federation.algorithm.name={algorithm}",
        "federation.capacity.default={layers: 1}",
        "federation.capacity.dealt=[{}, {targets: [o_proj]}]",
    )
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    first, last = initial_tensors(recipe), adapter(tmp_path / "run")
    stayed = moved = 0
    for name, value in last.items():
        name = name.removeprefix("base_model.model.")
        alike = value.shape == first[name].shape and torch.equal(value, first[name])
        if ".layers.0." in name:
            # an adapter with deltas is filled up with zeros
            rows = value[:4] if ".lora_A." in name else value[:, :4]
            assert torch.equal(rows, first[name]) and float(value.abs().sum()) == float(rows.abs().sum()), name
            stayed += 1
        else:
            moved += not alike
    assert stayed == 14 and moved >= 7
    written = lines(tmp_path / "run")
    assert all(len(line["replied"]) == 4 for line in written)
    if algorithm in ("fedex-lora", "flora", "ffa-lora", "rolora"):
        assert all(line["aggregation"]["aggregation_error"] < 1e-5 for line in written)


# ------------------------------------------------------------------------------------------------ steps and time


def test_a_slow_silo_stops_in_time_and_its_work_counts(tiny: Tiny, tmp_path: Path) -> None:
    """On the keyed virtual clock: 6 seconds are 2 steps of 2.5. What it sends is what two steps give."""
    timed = (
        "federation.algorithm.name=fedavg",
        "federation.rounds=2",
        "training.steps=4",
        "training.schedule=constant",
        "data.split.test=0",
    )
    slow = ("federation.capacity.default={seconds: 6.0}", "federation.speeds={kind: fixed, silos: {site1: 2.5}}")
    run_recipe(tiny.recipe(*timed, *slow), base=tiny.base, run_dir=tmp_path / "slow")
    for line in lines(tmp_path / "slow"):
        assert {silo: line["silos"][silo]["steps"] for silo in SITES} == {s: 2 if s == "site1" else 4 for s in SITES}
        assert [silo for silo in SITES if "planned_steps" in line["silos"][silo]] == ["site1"]
        assert line["silos"]["site1"]["planned_steps"] == 4
    asked = tiny.recipe(*timed, "federation.capacity.silos={site1: {steps: 2}}")
    run_recipe(asked, base=tiny.base, run_dir=tmp_path / "asked")
    assert same(adapter(tmp_path / "slow"), adapter(tmp_path / "asked"))
    run_recipe(tiny.recipe(*timed), base=tiny.base, run_dir=tmp_path / "all")
    assert not same(adapter(tmp_path / "slow"), adapter(tmp_path / "all"))


@pytest.mark.slow
def test_speeds_that_are_drawn_give_the_same_bits_in_two_processes(tiny: Tiny, tmp_path: Path) -> None:
    changes = (
        "federation.algorithm.name=scaffold",
        "federation.rounds=2",
        "training.steps=4",
        "federation.capacity={default: {seconds: 3.0}, dealt: [{}, {layers: 1}]}",
        "federation.speeds={kind: pareto}",
        "data.split.test=0",
    )
    run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=tmp_path / "one")
    run_recipe(tiny.recipe(*changes, "federation.workers=2"), base=tiny.base, run_dir=tmp_path / "two")
    assert same(adapter(tmp_path / "one"), adapter(tmp_path / "two"))
    steps = {line["silos"][silo]["steps"] for line in lines(tmp_path / "one") for silo in SITES}
    assert len(steps) > 1


# ------------------------------------------------------------------------------------------------ other things


def test_an_interrupted_run_of_mixed_silos_ends_in_the_same_bits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State at the silo (HetLoRA's rank), kept moments, and a part of the adapter."""
    recipe = tiny.recipe(
        *SHORT,
        "training.keep_optimizer=true",
        "federation.algorithm={name: scaffold}",
        "federation.capacity.dealt=[{}, {layers: 1, steps: 1}, {targets: [q_proj]}]",
    )
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "whole")
    train = Conversations.train

    def killed(self: Conversations, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return train(self, number, *rest)

    monkeypatch.setattr(Conversations, "train", killed)
    assert run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run").status == "interrupted"
    monkeypatch.undo()
    run_recipe(None, run_dir=tmp_path / "run", resume=True)
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "run"))


def test_a_silo_may_have_its_weights_in_another_type(tiny: Tiny, tmp_path: Path, seen: Seen) -> None:
    recipe = tiny.recipe(*SHORT, "federation.capacity.silos={site2: {dtype: bfloat16}}")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    assert seen.dtypes == {s: torch.bfloat16 if s == "site2" else torch.float32 for s in SITES}
    assert all(value.dtype == torch.float32 for value in adapter(tmp_path / "run").values())


def test_a_budget_of_memory_is_planned_and_too_small_a_one_is_an_error(tiny: Tiny, tmp_path: Path, seen: Seen) -> None:
    changes = (*SHORT, "federation.algorithm.name=flexlora", "training.batch_size=16")
    whole = tiny.recipe(*changes)
    need = predict(whole, shape_of(whole), Plan(rank=4)).total * (1 + MARGIN) / 10**6
    small = tiny.recipe(*changes, f"federation.capacity.silos={{site1: {{memory: {need - 1:.1f}MB}}}}")
    run_recipe(small, base=tiny.base, run_dir=tmp_path / "run")
    assert seen.specs["site0"].micro_batch_size is None and seen.specs["site1"].micro_batch_size is not None
    with pytest.raises(FedlmError, match=r"site1: error: .*500MB is too small for any rank: \d+ MB is the least"):
        run_recipe(
            tiny.recipe(*changes, "federation.capacity.silos={site1: {memory: 500MB}}"),
            base=tiny.base,
            run_dir=tmp_path / "none",
        )


# ------------------------------------------------------------------------------------------------ organisations


@pytest.fixture
def owner(tiny: Tiny, tmp_path: Path) -> Callable[..., OwnSilo]:
    """A real silo that takes the recipe's share; `policy` are lines of its owner's."""

    def make(name: str, policy: str = "") -> OwnSilo:
        folder = tmp_path / f"owner-{name}"
        text = data_file(folder, f"share_of_recipe: true\nbase: {tiny.base}\n")
        rules = folder / "policy.yaml"
        rules.write_text(f"models: {{tiny-model0: {tiny.recipe().model.source}}}\n{policy}")
        return OwnSilo(name, tmp_path / "states", text, rules)

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


# ------------------------------------------------------------------------------------------------ with other parts

MIXED = "federation.capacity.dealt=[{}, {rank: 2}, {layers: 1}, {rank: 1, targets: [q_proj, v_proj]}]"


@pytest.mark.parametrize("algorithm", ["flexlora", "flora", "hetlora"])
def test_only_what_has_changed_travels_and_the_bits_are_the_same(algorithm: str, tiny: Tiny, tmp_path: Path) -> None:
    changes = (*SHORT, f"federation.algorithm.name={algorithm}", MIXED, "federation.sample=3")
    run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=tmp_path / "full")
    changed = tiny.recipe(*changes, "federation.downlink.send=changed")
    run_recipe(changed, base=tiny.base, run_dir=tmp_path / "changed")
    assert same(adapter(tmp_path / "full"), adapter(tmp_path / "changed"))
    down = [sum(line["bytes_down"] for line in lines(tmp_path / run)) for run in ("full", "changed")]
    assert down[1] < down[0]


@pytest.mark.parametrize(("algorithm", "feedback", "deal"), [("flexlora", "false", MIXED), ("fedavg", "true", DEAL)])
def test_updates_of_mixed_silos_are_compressed(
    algorithm: str, feedback: str, deal: str, tiny: Tiny, tmp_path: Path
) -> None:
    """They end near the uncompressed model, with fewer bytes; what each silo lost stays with what it trains."""
    changes = (*SHORT, f"federation.algorithm.name={algorithm}", deal)
    run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=tmp_path / "plain")
    guarded = tiny.recipe(*changes, f"guards=[{{name: int4, error_feedback: {feedback}}}]")
    run_recipe(guarded, base=tiny.base, run_dir=tmp_path / "guarded")
    plain, rounded = lines(tmp_path / "plain"), lines(tmp_path / "guarded")
    assert all(line["replied"] == SITES for line in rounded)
    assert sum(x["bytes_up"] for x in rounded) < 0.6 * sum(x["bytes_up"] for x in plain)
    assert rounded[-1]["validation"]["loss"] == pytest.approx(plain[-1]["validation"]["loss"], rel=0.05)
