"""Silos that differ: in rank, in what they train of the adapter, in steps and time, in their weights' type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import FedlmError
from fedlm.federation.api import run_recipe
from fedlm.federation.conversations import Conversations
from fedlm.models.adapters import initial_tensors
from fedlm.training.footprint import shape_of
from fedlm.training.plan import MARGIN, Plan, predict
from tests.federation.conftest import Tiny
from tests.federation.mixed import SHORT, SITES, Seen, adapter, lines, model_after, same

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


@pytest.mark.slow
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
