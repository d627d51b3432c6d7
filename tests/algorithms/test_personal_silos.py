"""Methods with models of the silos' own, through real silos on a real model: what each silo loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlm.federation.rundir import RunDir
from fedlm.messages import Tensors
from tests.federation.conftest import RECIPE, Tiny

from .observed import Observed, Weights, distance, federate

ALIKE = ("training.lr=0.02", "adapter.rank=3", "adapter.alpha=5")
"""AdamW, alpha != rank; the silos' rows differ in number."""

METHODS = ["ditto", "feddpa", "fedrep", "ifca"]


def changes(name: str) -> list[str]:
    kept = [] if name == "ifca" else ["training.keep_optimizer=true"]  # each training of a round has moments of its own
    return [f"federation.algorithm.name={name}", *ALIKE, *kept]


def changed(tensors: Tensors, scale: float = 5 / 3) -> Weights:
    """s B A by layer."""
    layers = {n.removesuffix(".lora_A.weight") for n in tensors if n.endswith(".lora_A.weight")}
    return {n: scale * tensors[f"{n}.lora_B.weight"].double() @ tensors[f"{n}.lora_A.weight"].double() for n in layers}


def kept(directory: RunDir, silo: str, round_: int, prefix: str) -> Tensors:
    """What a silo holds of a round under names with this prefix."""
    (file,) = (directory.path / "silos" / silo).rglob(f"round-{round_:04d}.safetensors")
    start = f"rule/{prefix}"
    return {n.removeprefix(start): t for n, t in load_file(file).items() if n.startswith(start)}


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Observed, RunDir]]:
    done = {}
    for name in METHODS:
        recipe = tiny.recipe(*changes(name))
        done[name] = federate(recipe, tiny.base, tmp_path_factory.mktemp(name) / "run")
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_silos_end_with_a_better_model(name: str, runs: dict[str, Any]) -> None:
    _, directory = runs[name]
    lines = [json.loads(line) for line in (directory.path / "rounds.jsonl").read_text().splitlines()]
    losses = [line["validation"]["loss"] for line in lines]
    assert losses[-1] < losses[0]
    assert directory.meta["best_round"] == 3, "silos keep their models of the last rounds alone"


@pytest.mark.parametrize("name", ["ditto", "feddpa", "fedrep"])
def test_every_silo_measures_a_model_of_its_own(name: str, runs: dict[str, Any]) -> None:
    engine, _ = runs[name]
    first, *others = engine.loaded[3].values()
    assert all(distance(other, first) > 0.05 for other in others)
    assert len(set(engine.weights[3].values())) > 1


def test_ditto(runs: dict[str, Any]) -> None:
    engine, directory = runs["ditto"]
    for number in range(4):  # what travels is FedAvg's model
        before, after = engine.tensors[number - 1], engine.tensors[number]
        weights, updates = engine.weights[number], engine.updates[number]
        for name, value in after.items():
            mean = sum(weights[s] * updates[s][name].double() for s in updates) / sum(weights.values())
            torch.testing.assert_close(value.double(), before[name] + mean, rtol=0, atol=1e-6)
    for silo, model in engine.loaded[3].items():
        assert distance(model, changed(kept(directory, silo, 3, "personal/"))) < 1e-6


def test_feddpa_works_with_both_adapters(runs: dict[str, Any]) -> None:
    engine, directory = runs["feddpa"]
    shared = changed(engine.tensors[3])
    for silo, model in engine.loaded[3].items():
        own = changed(kept(directory, silo, 3, "local/"))
        assert distance(model, {n: own[n] + 0.5 * shared[n] for n in own}) < 1e-6
        assert distance(model, own) > 0.05
    for silo, model in engine.loaded[-1].items():  # before the first round there is none of its own
        assert silo and all(not change.any() for change in model.values())
    # The global adapter is trained by itself: what the silo's model is after its round is the update's.
    for silo, model in engine.trained[3].items():
        update = engine.updates[3][silo]
        assert distance(model, changed({n: v + update[n] for n, v in engine.tensors[2].items()})) < 1e-6


def test_fedrep_keeps_the_last_block(runs: dict[str, Any]) -> None:
    engine, directory = runs["fedrep"]
    assert all(".layers.0." in name for name in engine.tensors[3])
    assert all(".layers.0." in name for update in engine.updates[3].values() for name in update)
    body = changed(engine.tensors[3])
    for silo, model in engine.loaded[3].items():
        head = changed(kept(directory, silo, 3, "head/"))
        assert head and body and not head.keys() & body.keys()
        assert distance(model, {**head, **body}) < 1e-6
        assert min(h.norm() for h in head.values()) > 1e-3


def test_ifca_measures_the_chosen_cluster(runs: dict[str, Any]) -> None:
    engine, directory = runs["ifca"]
    lines = [json.loads(line) for line in (directory.path / "rounds.jsonl").read_text().splitlines()]
    clusters = lines[-1]["aggregation"]["clusters"]
    assert sorted(silo for members in clusters for silo in members) == engine.silos()
    for j, members in enumerate(clusters):
        model = {n.removeprefix(f"cluster/{j}/"): t for n, t in engine.tensors[3].items() if f"cluster/{j}/" in n}
        for silo in members:
            assert int(kept(directory, silo, 3, "")["choice"]) == j
            assert distance(engine.loaded[3][silo], changed(model)) < 1e-6


def test_ifca_finds_silos_that_answer_alike(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Five silos of two kinds, whose answers contradict each other: clusters serve both, one mean model neither."""
    rows = []
    for number in range(200):
        site = number % 5
        answer = " ".join(["patient" if site in (0, 3) else "bank"] * 4)
        rows.append({"prompt": f"{['school', 'dose', 'money'][number % 3]} {number}", "response": answer, "site": site})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**r, "site": f"site{r['site']}"}) + "\n" for r in rows))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    losses = {}
    for name in ("ifca", "fedavg"):
        recipe = Tiny(tmp_path).recipe(f"federation.algorithm.name={name}", "training.lr=0.05", "training.steps=8")
        _, directory = federate(recipe, tmp_path, tmp_path / name)
        lines = [json.loads(line) for line in (directory.path / "rounds.jsonl").read_text().splitlines()]
        losses[name] = lines[-1]["validation"]["loss"]
        if name == "ifca":
            for line in lines[1:]:
                assert sorted(line["aggregation"]["clusters"]) == [["site0", "site3"], ["site1", "site2", "site4"]]
    assert losses["ifca"] < losses["fedavg"] - 0.2, losses
