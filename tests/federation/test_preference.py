"""Preference alignment through whole federations: figures, the reference, resumed runs, other engines, bad rows."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import fedlm.training.forward as forward
from fedlm.comparison.triple import compare
from fedlm.data.federated import load_data
from fedlm.errors import FedlmError, RecipeError, RunError
from fedlm.federation.api import about, new_run, run_recipe
from fedlm.federation.coordinator import run
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.silo import Workbench
from fedlm.federation.silo.reference import Reference, reference_hash
from fedlm.messages import Tensors
from fedlm.models.adapters import base_only
from fedlm.training.forward import sequence_nll
from fedlm.training.objective import sequences_of
from tests.federation.interrupted import Interrupted, ended, lines, over_a_network
from tests.federation.preferences import JUDGED, Preferences


@pytest.fixture(scope="module")
def tiny_preferences(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Preferences:
    return Preferences(tmp_path_factory.mktemp("preferences"), tiny_model_dir)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto", "orpo", "simpo"])
def test_every_loss_learns_and_is_measured(loss: str, tiny_preferences: Preferences, tmp_path: Path) -> None:
    of = tiny_preferences
    result = run_recipe(
        of.recipe(
            f"preference.loss={loss}",
            "training={lr: 0.02, steps: 8, batch_size: 8, max_length: 96}",
            *(["preference.beta=2"] if loss == "orpo" else []),  # beside its likelihood 0.1 shows only after many steps
        ),
        base=of.base,
        run_dir=tmp_path / "run",
    )
    assert result.status == "finished"
    before, *_, after = lines(tmp_path / "run")
    first, last = before["validation"], after["validation"]
    assert last["loss"] < first["loss"] and last["reward_margin"] > first["reward_margin"]
    assert last["reward_accuracy"] > 0.8
    assert "perplexity" not in last and last["chosen_logp"] < 0
    if loss in ("dpo", "ipo", "kto"):  # the policy is the reference: no reward differs
        wanted = {"dpo": 0.6931472, "ipo": 25.0, "kto": 0.5}[loss]
        assert first["loss"] == pytest.approx(wanted, abs=1e-5)
        assert first["reward_accuracy"] == pytest.approx(0.5, abs=1e-6) and abs(first["reward_margin"]) < 1e-6
    assert first["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 1e-4
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert told["final"]["reward_accuracy_interval"][0] > 0.5 and set(told["final"]["silos"]) == {"site0", "site1"}


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_the_same_bits_over_a_network_and_resumed(loss: str, tiny_preferences: Preferences, tmp_path: Path) -> None:
    of, here, there = tiny_preferences, tmp_path / "here", tmp_path / "there"
    changes = (f"preference.loss={loss}", "preference.weights={helpful: 2.0, harmless: 1.0}")
    recipe = of.recipe(*changes)
    run_recipe(recipe, base=of.base, run_dir=here)
    over_a_network(recipe, of.base, there, tmp_path / "network")
    (tensors, told), (wanted, wanted_told) = ended(there), ended(here)
    assert told == wanted_told and tensors.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(tensors[name], value)] == []


@pytest.fixture
def bench(tiny_preferences: Preferences) -> Workbench:
    recipe = tiny_preferences.recipe()
    bench = Workbench(recipe, load_data(recipe, tiny_preferences.base))
    bench.load()
    return bench


def test_the_reference_is_the_base_and_asked_once(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is remembered are the base's log-probabilities, whatever adapter is loaded and whatever the round."""
    sequences = sequences_of(list(bench.training_tokens("site0")))
    with base_only(bench.model):
        wanted = -sequence_nll(bench.model, sequences, bench.recipe.evaluation.batch_tokens)[0]
    bench.put({name: torch.randn(p.shape) for name, p in bench.put({}).items()})
    assert np.array_equal(Reference(bench, tmp_path, "first").logps(sequences), wanted)
    (file,) = (tmp_path / "reference").iterdir()
    assert file.stat().st_mode & 0o077 == 0

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr(forward, "sequence_nll", never)
    assert np.array_equal(Reference(bench, tmp_path, "second").logps(sequences), wanted)
    with pytest.raises(AssertionError, match="asked again"):
        Reference(bench, tmp_path, "second").logps(sequences[1:])
    file.write_bytes(b"short")
    with pytest.raises(RunError, match="is damaged"):
        Reference(bench, tmp_path, "second").logps(sequences)


def test_a_start_other_than_the_base_is_the_reference(bench: Workbench, tmp_path: Path) -> None:
    """The start's values stand in the same modules while it is asked; then those that were there stand again."""
    names = {name: p.shape for name, p in bench.put({}).items()}
    generator = torch.Generator().manual_seed(7)

    def drawn(rank: int) -> Tensors:
        shapes = {n: (rank, s[1]) if ".lora_A." in n else (s[0], rank) for n, s in names.items()}
        return {n: torch.randn(shape, generator=generator) * 0.2 for n, shape in shapes.items()}

    start, now = drawn(2), drawn(3)
    layer = next(iter(names)).split(".lora_")[0]
    width = names[f"{layer}.lora_A.weight"][1], names[f"{layer}.lora_B.weight"][0]
    now[f"{layer}.delta_W.merged"] = torch.randn(width[1], width[0], generator=generator)
    ids = torch.arange(3, 40)[None]

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return bench.model(input_ids=ids, use_cache=False).logits

    bench.put(start)
    wanted = logits()
    bench.start = start
    bench.put(now)
    before = logits()
    with Reference(bench, tmp_path, "run").inside():
        assert torch.equal(logits(), wanted)
    assert torch.equal(logits(), before) and not torch.equal(before, wanted)
    with pytest.raises(ValueError, match="inside"), Reference(bench, tmp_path, "run").inside():
        raise ValueError("inside")
    assert torch.equal(logits(), before)
    bare = reference_hash(bench)
    bench.start = {}
    assert reference_hash(bench) != bare


def test_another_base_at_resume_is_an_error(
    tiny_preferences: Preferences, tiny_model_dir: Path, tmp_path: Path
) -> None:
    of, model, folder = tiny_preferences, tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model_dir, model)
    recipe = of.recipe(f"model.source={model}")
    data = load_data(recipe, of.base)
    with closing(new_run(recipe, folder, base=of.base, **about(data))) as directory:
        with closing(LocalEngine(recipe, data, folder, base=of.base)) as engine:
            assert run(recipe, Interrupted(engine), directory).status == "interrupted"
        weights = load_file(model / "model.safetensors")
        weights["model.norm.weight"] *= 1.01
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        with (
            closing(LocalEngine(recipe, data, folder, base=of.base)) as engine,
            pytest.raises(RunError, match="base model or the adapter that this run began with has changed"),
        ):
            run(recipe, engine, directory, resume=True)


@pytest.mark.parametrize("name", ["scaffold", "ifca", "lorm", "fedmezo", "flora", "fed-sb", "fedbuff"])
def test_other_algorithms(name: str, tiny_preferences: Preferences, tmp_path: Path) -> None:
    """Rules that look at losses, take no gradients, merge into the base or train other parameters."""
    of = tiny_preferences
    adapter = "{kind: lora-sb, rank: 2}" if name == "fed-sb" else "{rank: 2}"
    changes = (f"federation.algorithm.name={name}", "preference.loss=kto", f"adapter={adapter}", "data.split.test=0")
    run_recipe(of.recipe(*changes, "evaluation.max_examples=4"), base=of.base, run_dir=tmp_path / "run")
    first, *_, last = lines(tmp_path / "run")
    assert first["validation"]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert last["validation"]["loss"] != first["validation"]["loss"]


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_soft_prompts(kind: str, packing: str, tiny_preferences: Preferences, tmp_path: Path) -> None:
    """The reference is the base without the prompt, which changes answers from the start."""
    of = tiny_preferences
    changes = (f"adapter={{kind: {kind}}}", "federation.rounds=1", "data.split.test=0", f"training.packing={packing}")
    run_recipe(of.recipe(*changes), base=of.base, run_dir=tmp_path / "run")
    before, after = (line["validation"] for line in lines(tmp_path / "run"))
    assert before["kl"] != after["kl"]
    assert 0 < after["kl"] < 0.1 and abs(after["loss"] - 0.6931472) > 1e-5


def test_full_training_without_a_reference(tiny_preferences: Preferences, tmp_path: Path) -> None:
    of = tiny_preferences
    changes = ("adapter={kind: full}", "preference.loss=simpo", "federation.rounds=1", "data.split.test=0")
    run_recipe(of.recipe(*changes), base=of.base, run_dir=tmp_path / "run")
    _, last = lines(tmp_path / "run")
    assert "reward_accuracy" in last["validation"] and "kl" not in last["validation"]


def test_judged_answers(tiny_preferences: Preferences, tmp_path: Path) -> None:
    of = tiny_preferences
    changes = (
        JUDGED,
        "preference={loss: kto, beta: 0.5}",
        "training={steps: 8, batch_size: 8, max_length: 96, lr: 0.02}",
    )
    run_recipe(of.recipe(*changes), base=of.base, run_dir=tmp_path / "run")
    first, *_, last = lines(tmp_path / "run")
    assert first["validation"]["reward_accuracy"] == pytest.approx(0.5) and "ranking_accuracy" not in last["validation"]
    assert last["validation"]["reward_accuracy"] > 0.8 and last["validation"]["reward_margin"] > 0


def test_a_silo_with_wanted_answers_only(tiny_preferences: Preferences, tmp_path: Path) -> None:
    of = tiny_preferences
    wanted = JUDGED.replace("path: judged.jsonl", "path: judged.jsonl, where: {good: true}")
    with pytest.raises(FedlmError, match="this one has wanted ones only"):
        run_recipe(of.recipe(wanted, "preference.loss=kto"), base=of.base, run_dir=tmp_path / "run")


def test_weights_of_a_silo_that_is_not_there(tiny_preferences: Preferences, tmp_path: Path) -> None:
    both = "{helpful: 1.0, harmless: 2.0}"
    recipe = tiny_preferences.recipe(f"preference={{weights: {both}, silo_weights: {{site7: {both}}}}}")
    with pytest.raises(RecipeError, match="there is no silo 'site7'"):
        run_recipe(recipe, base=tiny_preferences.base, run_dir=tmp_path / "run")


def test_compared_with_silos_alone(tiny_preferences: Preferences, tmp_path: Path) -> None:
    """The verdict is on reward accuracy; the base, which is the reference, is right by chance."""
    of = tiny_preferences
    changes = ("federation.rounds=1", "training={steps: 4, batch_size: 8, max_length: 96, lr: 0.02}")
    outcome = compare(of.recipe(*changes), base=of.base, run_dir=tmp_path / "run", budgets=["steps"])
    rows = {row["arm"]: row for row in outcome["table"]}
    assert outcome["verdict"]["metric"] == "reward_accuracy" and rows["base"]["reward_accuracy"] == 0.5
    assert "reward accuracy on" in outcome["verdict"]["sentence"]
    assert rows["federated"]["reward_accuracy"] > 0.5 and rows["federated"].get("perplexity") is None
    low, high = rows["federated"]["loss_interval"]
    assert low <= rows["federated"]["loss"] <= high
