"""Reinforcement through whole federations: rewards, the same bits resumed over a network, a reward model, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import ModelError, RecipeError
from fedlm.federation.api import run_recipe
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from tests.federation.interrupted import ended, lines, over_a_network
from tests.federation.preferences import Preferences

RECIPE = """
name: tiny-reinforce
task: reinforce
model: {{source: {model}, dtype: float32}}
adapter: {{rank: 2, alpha: 6}}
data:
  sources: [{{path: pairs.jsonl, columns: {{prompt: prompt, response: chosen}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0.2}}
training: {{steps: 2, batch_size: 3, max_length: 96, lr: 0.01}}
reinforce: {{completions: 3, max_new_tokens: 6, beta: 0.1, reward: {{kind: f1}}}}
federation: {{rounds: 2, workers: 1}}
"""


class Asking:
    """A folder with a recipe of reinforcement, over the prompts of a folder of preferences."""

    def __init__(self, preferences: Preferences, model: Path) -> None:
        self.base, self.preferences = preferences.base, preferences
        (self.base / "reinforce.yaml").write_text(RECIPE.format(model=model))

    def recipe(self, *changes: str) -> Recipe:
        return load_recipe(self.base / "reinforce.yaml", changes)


@pytest.fixture(scope="module")
def asking(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Asking:
    return Asking(Preferences(tmp_path_factory.mktemp("reinforce"), tiny_model_dir), tiny_model_dir)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_a_run_writes_is_rewarded_and_measured(method: str, asking: Asking, tmp_path: Path) -> None:
    run_recipe(asking.recipe(f"reinforce.method={method}"), base=asking.base, run_dir=tmp_path / "run")
    first, *_, last = lines(tmp_path / "run")
    assert first["validation"]["kl"] == pytest.approx(0, abs=1e-6) and last["validation"]["kl"] > 1e-6
    assert last["validation"]["loss"] == -last["validation"]["reward"]
    assert "perplexity" not in last["validation"] and 0 <= last["validation"]["reward"] <= 1
    assert {"reward", "kl", "flat_groups", "answer_tokens", "unfinished"} <= last["figures"].keys()
    assert abs(last["figures"]["kl"]) > 1e-6  # to what the run began with, not to the policy itself
    for line in last["silos"].values():
        assert line["examples"] == 2 * 3 * 3 and line["target_tokens"] <= 18 * 6
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(told["final"]["silos"]) == {"site0", "site1"}


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_the_same_bits_over_a_network_and_resumed(method: str, asking: Asking, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    recipe = asking.recipe(f"reinforce.method={method}", "data.split.test=0")
    run_recipe(recipe, base=asking.base, run_dir=here)
    over_a_network(recipe, asking.base, there, tmp_path / "network")
    (tensors, told), (wanted, wanted_told) = ended(there), ended(here)
    assert told == wanted_told and tensors.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(tensors[name], value)] == []


def test_a_reward_model_judges(asking: Asking, tmp_path: Path) -> None:
    judge = asking.preferences.recipe(
        "task=reward", "training={lr: 0.02, steps: 6, batch_size: 8, max_length: 96}", "data.split.test=0"
    )
    run_recipe(judge, base=asking.base, run_dir=tmp_path / "judge")
    source = f"reinforce.reward={{kind: model, run: {tmp_path / 'judge'}}}"
    run_recipe(asking.recipe(source, "data.split.test=0"), base=asking.base, run_dir=tmp_path / "run")
    first, *_, last = lines(tmp_path / "run")
    assert not 0 <= first["validation"]["reward"] <= 1  # no share of words
    assert last["figures"]["flat_groups"] == 0 and last["validation"]["kl"] > 1e-6  # rewards of a model differ
    told: list[str] = []
    with pytest.raises(ModelError, match="no run here"):
        run_recipe(
            asking.recipe(f"reinforce.reward={{kind: model, run: {tmp_path / 'none'}}}"),
            base=asking.base,
            run_dir=tmp_path / "without",
            observe=lambda event: told.append(event["kind"]),
        )
    assert "run_started" not in told and not (tmp_path / "without").exists()  # before any silo is asked


def test_after_another_stage(asking: Asking, tmp_path: Path) -> None:
    """The reference is the model that the run begins with: there is no KL to it before anything is learnt."""
    run_recipe(asking.preferences.recipe("data.split.test=0"), base=asking.base, run_dir=tmp_path / "before")
    recipe = asking.recipe(f"start={{run: {tmp_path / 'before'}}}", "data.split.test=0", "federation.rounds=1")
    run_recipe(recipe, base=asking.base, run_dir=tmp_path / "run")
    first, last = lines(tmp_path / "run")
    assert first["validation"]["kl"] == pytest.approx(0, abs=1e-6) and last["validation"]["kl"] > 1e-7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["reinforce.method=rloo", "reinforce.loss=grpo"], "has no effect with 'rloo'"),
        (["reinforce.reward={kind: model}"], "name the run of the reward model"),
        (["reinforce.reward={kind: f1, run: runs/x}"], "has no effect without kind: model"),
        (["reinforce.max_new_tokens=96"], "leaves no room for a prompt"),
        (["adapter.dropout=0.1"], "answers are written without it"),
        (["adapter={kind: full}"], "full training overwrites"),
        (["federation.algorithm.weights=tokens"], "prompts without target tokens"),
        (["federation.algorithm.name=ifca"], "compares losses of models"),
        (["federation.algorithm.name=fedmezo"], "compares losses of models"),
        (["task=instruct"], "has no effect with task 'instruct'"),
        (["evaluation.metrics=[rouge]"], "no figure of the task 'reinforce'"),
    ],
)
def test_what_cannot_be_is_refused(changes: list[str], words: str, asking: Asking) -> None:
    with pytest.raises(RecipeError, match=words):
        asking.recipe(*changes)


@pytest.mark.slow
def test_other_adapters_and_algorithms(asking: Asking, tmp_path: Path) -> None:
    settings: list[list[Any]] = [
        ["adapter={kind: full}", "reinforce.beta=0"],
        ["federation.algorithm.name=scaffold"],
        ["federation.algorithm.name=flora", "adapter={rank: 2}"],
        ["federation.algorithm.name=fed-sb", "adapter={kind: lora-sb, rank: 2}"],
    ]
    for number, changes in enumerate(settings):
        folder = tmp_path / str(number)
        run_recipe(asking.recipe(*changes, "data.split.test=0"), base=asking.base, run_dir=folder)
        assert len(lines(folder)) == 3
