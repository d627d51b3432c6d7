"""Methods that exchange whatever is trained: with LoRA, IA3 and full weights, through real silos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.federation.conftest import Tiny

from .observed import federate

METHODS = {
    "feddyn": ["dyn_alpha=1.0"],
    "ditto": [],
    "ties": ["density=0.5"],
    "task-arithmetic": ["server_lr=0.25"],
}


@pytest.mark.parametrize("adapter", ["lora", "ia3", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_it_learns(tiny: Tiny, tmp_path: Path, name: str, adapter: str) -> None:
    options = [f"federation.algorithm.{option}" for option in METHODS[name]]
    rate = "training.lr=1e-3" if adapter == "full" else "training.lr=0.03"
    recipe = tiny.recipe(
        f"federation.algorithm.name={name}", "federation.rounds=2", f"adapter={{kind: {adapter}}}", rate, *options
    )
    engine, directory = federate(recipe, tiny.base, tmp_path / "run")
    lines = [json.loads(line) for line in (directory.path / "rounds.jsonl").read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in lines]
    assert losses[2] < losses[0] - 1e-4
    # The model that silos measure is made of the updates that left them.
    before, after = engine.tensors[0], engine.tensors[1]
    weights, updates = engine.weights[1], engine.updates[1]
    for parameter, value in after.items():
        u = [updates[s][parameter].double() for s in updates]
        step = value.double() - before[parameter].double()
        if name == "ditto":
            expected = sum(w * x for w, x in zip(weights.values(), u, strict=True)) / sum(weights.values())
        elif name == "task-arithmetic":
            expected = 0.25 * sum(u)
        elif name == "feddyn":  # u + h_0 - h_1 of both rounds: -h / alpha adds up the mean updates
            first = [engine.updates[0][s][parameter].double() for s in updates]
            expected = 2 * sum(u) / len(u) + sum(first) / len(first)
        else:
            continue  # TIES looks at all parameters together: see test_merging.py
        torch.testing.assert_close(step, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["fedrep", "ifca"])
def test_with_ia3(tiny: Tiny, tmp_path: Path, name: str) -> None:
    recipe = tiny.recipe(
        f"federation.algorithm.name={name}", "federation.rounds=2", "adapter={kind: ia3}", "training.lr=0.03"
    )
    _, directory = federate(recipe, tiny.base, tmp_path / "run")
    lines = [json.loads(line) for line in (directory.path / "rounds.jsonl").read_text().splitlines()]
    assert lines[2]["validation"]["loss"] < lines[0]["validation"]["loss"] - 1e-4


@pytest.mark.parametrize(
    "changes, reason",
    [
        (["name=feddyn", "server_lr=0.5"], "server_lr: has no effect with 'feddyn'"),
        (["name=feddyn", "weights=tokens"], "feddyn counts every silo the same"),
        (["name=ties", "weights=examples"], "ties counts every silo the same"),
        (["name=ditto", "density=0.5"], r"density: has no effect with 'ditto' \(it belongs to ties\)"),
        (["name=ties", "ditto_lambda=2"], r"ditto_lambda: has no effect with 'ties' \(it belongs to ditto\)"),
        (["name=ifca", "clusters=1"], "clusters"),
        (["name=feddpa", "local_weight=1.0"], "local_weight"),
        (["name=fedrep", "personal_part=lora_C"], "personal_part"),
        (["name=feddpa", "adapter={kind: ia3}"], "'feddpa' trains lora, not 'ia3'"),
        (["name=ifca", "adapter={kind: full}"], "'ifca' trains lora or ia3, not 'full'"),
        (["name=fedrep", "personal_part=lora_B", "adapter={kind: ia3}"], "a 'ia3' adapter has no lora_B"),
        (["name=fedrep", "training.steps=1"], "'fedrep' needs at least 2 steps a round"),
        (["name=lorm", "federation.rounds=1"], "'lorm' needs at least 2 rounds"),
        (["name=rolora", "federation.rounds=1"], "'rolora' needs at least 2 rounds"),
        (["name=ifca", "federation.rounds=1"], "'ifca' needs at least 2 rounds"),
        (["name=lorm", "training.keep_optimizer=true"], "keep_optimizer: has no effect with 'lorm'"),
        (["name=ifca", "training.keep_optimizer=true"], "keep_optimizer: has no effect with 'ifca'"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(tiny: Tiny, changes: list[str], reason: str) -> None:
    from fedlm.errors import RecipeError

    own = ("adapter", "training", "federation")
    with pytest.raises(RecipeError, match=reason):
        tiny.recipe(*(c if c.startswith(own) else f"federation.algorithm.{c}" for c in changes))
