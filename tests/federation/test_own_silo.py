"""A real silo: agrees to runs by version, policy and fingerprint, goes on after a restart, gives a simulation's bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.federation import coordinator
from fedlm.federation.api import new_run, run_recipe, using
from fedlm.federation.silo.own import OwnSilo
from fedlm.files import read_tensors
from fedlm.messages import Failure, FailureKind, Reply, Request
from fedlm.models.adapters import initial_tensors
from fedlm.models.fingerprint import fingerprint
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.own_silos import Network, data_file, greeting

SOURCE = "{path: rows.jsonl, columns: {prompt: prompt, response: response}, where: {site: %s}}"
SITES = [f"site{n}" for n in range(4)]


@pytest.fixture
def recipe(tiny: Tiny) -> Recipe:
    """Each silo brings its own text; the model goes by a name that the owner's policy knows."""
    made = tiny.recipe("data.sources=[]", "data.partition=null", "data.at_silos=true")
    return made.model_copy(update={"model": made.model.model_copy(update={"source": "/at/the/coordinator/tiny"})})


@pytest.fixture
def owner(tiny: Tiny, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., OwnSilo]:
    """A silo of this name, whose policy maps the model; `policy` adds lines."""

    def make(name: str = "site1", policy: str = "", data: str | None = None) -> OwnSilo:
        folder = tmp_path / f"owner-{name}"
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_bytes((tiny.base / "rows.jsonl").read_bytes())
        text = data_file(folder, data or f"sources: [{SOURCE % name}]\n")
        rules = folder / "policy.yaml"
        rules.write_text(f"models: {{tiny: {tiny_model_dir}}}\n{policy}")
        return OwnSilo(name, tmp_path / "states", text, rules)

    return make


def hello(recipe: Recipe, run: str = "run", silo: str = "site1", **changes: Any) -> Request:
    return Request(silo, "hello", run, -1, fields=greeting(recipe, **changes))


def train(recipe: Recipe, tiny: Tiny, round_: int = 0, run: str = "run") -> Request:
    tensors = initial_tensors(recipe.model_copy(update={"model": tiny.recipe().model}))
    if recipe.federation.algorithm.name == "scaffold":
        from fedlm.algorithms import get_algorithm

        algorithm = get_algorithm(recipe.federation.algorithm)
        tensors = algorithm.broadcast(tensors, algorithm.init_state(tensors))
    return Request("site1", "train", run, round_, 0, tensors, {"round": round_, "rounds": 4, "accepted": -1})


def reply_of(answer: Reply | Failure) -> Reply:
    assert isinstance(answer, Reply), answer
    return answer


def failure_of(answer: Reply | Failure, kind: FailureKind) -> str:
    assert isinstance(answer, Failure) and answer.kind is kind, answer
    return answer.reason


def test_the_bits_are_those_of_a_run_on_one_machine(
    tiny: Tiny, recipe: Recipe, owner: Callable[..., OwnSilo], tmp_path: Path
) -> None:
    """Stateful algorithm, AdamW, four rounds; the recipe on one machine names the same sources."""
    own = [{"name": n, "sources": [{**_source(n), "path": str(tiny.base / "rows.jsonl")}]} for n in SITES]
    simulated = Recipe.model_validate(
        {**tiny.recipe().model_dump(mode="json"), "data": {**recipe.data.model_dump(), "at_silos": False, "silos": own}}
    )
    local = run_recipe(simulated, run_dir=tmp_path / "local")

    silos = {name: owner(name) for name in SITES}
    whole = recipe.model_copy(update={"model": tiny.recipe().model})
    network = Network(recipe, silos, fingerprint(whole.model))
    with using(new_run(whole, tmp_path / "network")) as directory:
        there = coordinator.run(whole, network, directory)
    wanted = read_tensors(tmp_path / "local" / "adapter" / "adapter_model.safetensors")
    got = read_tensors(tmp_path / "network" / "adapter" / "adapter_model.safetensors")
    assert wanted.keys() == got.keys() and all(torch.equal(wanted[n], got[n]) for n in wanted)
    assert local.evaluation == there.evaluation


def _source(site: str) -> dict[str, Any]:
    return {"columns": {"prompt": "prompt", "response": "response"}, "where": {"site": site}}
