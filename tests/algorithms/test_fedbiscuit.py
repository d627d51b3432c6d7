"""FedBiscuit: equal groups by loss, the warm-up, and what several selectors can that one cannot."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlm.algorithms.fedbiscuit import asks, balanced, digest, warm_up
from fedlm.errors import DataError, ModelError, RecipeError
from fedlm.inference.selectors import load_selectors
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import AlgorithmSpec

from .observed import federate
from .test_personal import FIRST, adamw, planted
from .toy_session import ToyFederation


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_equal_and_fit(seed: int) -> None:
    draw = np.random.default_rng(seed)
    n, k = int(draw.integers(1, 20)), int(draw.integers(1, 5))
    losses = draw.random((n, k))
    groups = balanced(losses.tolist(), draw.permutation(n).tolist())
    sizes = [Counter(groups.values())[j] for j in range(k)]
    assert groups.keys() == set(range(n)) and max(sizes) - min(sizes) <= 1
    # Where as many prefer each selector, everyone gets the one that fits best.
    best = np.repeat(np.arange(k), 3)
    wanted = np.where(np.arange(k) == best[:, None], 0.0, 1.0 + losses[:1])
    found = balanced(wanted.tolist(), draw.permutation(3 * k).tolist())
    assert [found[i] for i in range(3 * k)] == best.tolist()


def test_those_who_come_late_get_their_second_choice() -> None:
    losses = [[0.1, 0.5, 0.9], [0.1, 0.9, 0.5], [0.1, 0.5, 0.9], [0.1, 0.9, 0.5], [0.9, 0.1, 0.5]]
    assert balanced(losses, [3, 0, 4, 1, 2]) == {3: 0, 0: 0, 1: 2, 2: 1, 4: 1}


def test_when_silos_are_regrouped() -> None:
    spec = AlgorithmSpec(name="fedbiscuit", clusters=2, warm_rounds=2, regroup=3)
    assert warm_up(spec) == 4 and [r for r in range(12) if asks(spec, r)] == [3, 6, 9]


def test_the_warm_up_is_fedavg_for_one_selector_after_the_other() -> None:
    silos, _ = planted(4, 1)
    federation = ToyFederation(silos, AlgorithmSpec(name="fedbiscuit", warm_rounds=2, regroup=9), FIRST)
    for j in range(2):
        plain = ToyFederation(silos, AlgorithmSpec(name="fedavg"), FIRST)
        for _ in range(2):
            others = {n: v for n, v in federation.theta.items() if not n.startswith(f"cluster/{j}/")}
            federation.round()
            wanted = plain.round()
            for name, value in wanted.items():
                torch.testing.assert_close(federation.theta[f"cluster/{j}/{name}"], value, rtol=0, atol=1e-6)
            assert all(torch.equal(federation.theta[n], v) for n, v in others.items())


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_planted_groups_whose_step_is_fedavg(seed: int) -> None:
    silos, _ = planted(6, seed)
    federation = ToyFederation(silos, AlgorithmSpec(name="fedbiscuit", regroup=2), FIRST, optimizer=adamw(0.2))
    for _ in range(16):
        before = {name: value.clone() for name, value in federation.theta.items()}
        federation.round()
    groups = federation.figures["clusters"]
    assert sorted(groups) == [["silo-0", "silo-2", "silo-4"], ["silo-1", "silo-3", "silo-5"]]
    assert len(federation.server["groups"]) == 7 and digest("silo-3") in federation.server["groups"][:, 0]
    for j, members in enumerate(groups):
        then = {n: before[f"cluster/{j}/{n}"] for n in FIRST}
        alone = [silos[int(name.removeprefix("silo-"))] for name in members]
        wanted = ToyFederation(alone, AlgorithmSpec(name="fedavg"), then, optimizer=adamw(0.2)).round()
        for name, value in wanted.items():
            torch.testing.assert_close(federation.theta[f"cluster/{j}/{name}"], value, rtol=0, atol=1e-6)
    for i, silo in enumerate(silos):
        assert (federation.loaded(i).double() - silo.b).norm() < 0.5


RECIPE = """
name: selectors
task: {task}
model: {{source: {model}, dtype: float32, device: cpu}}
adapter: {{rank: 4, alpha: 16}}
data:
  sources: [{{path: rows.jsonl, columns: {{prompt: text, chosen: good, rejected: bad}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.25, test: 0}}
training: {{steps: 5, batch_size: 8, max_length: 160, lr: 0.01, schedule: constant}}
federation: {{rounds: 5, workers: 1, algorithm: {{name: fedbiscuit, regroup: 2}}}}
"""


@pytest.fixture(scope="module")
def torn(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """Six silos that like the same answers, three of them the one kind and three the other."""
    folder = tmp_path_factory.mktemp("torn")
    draw = random.Random(0)
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(120):
            bank, school = (draw.choice(words) for words in (["bank", "money"], ["school", "books"]))
            both = [bank, school] if i % 2 else [school, bank]
            prompt = " ".join(draw.choices(["was", "given", "and", "to", "the"], k=2))
            file.write(json.dumps({"text": prompt, "good": both[0], "bad": both[1], "site": f"s{i % 6}"}) + "\n")
    for task in ("reward", "selector"):
        (folder / f"{task}.yaml").write_text(RECIPE.format(model=tiny_model_dir, task=task))
    return folder


@pytest.mark.slow
def test_two_reward_models_serve_silos_that_one_cannot(torn: Path, tmp_path: Path) -> None:
    """Silos with opposite preferences: what FedAvg learns from one half it unlearns from the other (the paper's
    heterogeneity of preferences)."""
    found = {}
    for name, more in (("fedbiscuit", []), ("fedavg", ["federation.algorithm={name: fedavg}"])):
        _, directory = federate(load_recipe(torn / "reward.yaml", more), torn, tmp_path / name, interrupt=4)
        found[name] = directory.rounds()
    assert found["fedavg"][-1]["validation"]["reward_accuracy"] < 0.7
    assert found["fedbiscuit"][-1]["validation"]["reward_accuracy"] > 0.95
    assert sorted(found["fedbiscuit"][-1]["aggregation"]["clusters"]) == [["s0", "s2", "s4"], ["s1", "s3", "s5"]]


def test_selectors_vote(torn: Path, tmp_path: Path) -> None:
    more = ["federation.rounds=3", "training.steps=2", "data.partition.max_silos=2"]
    federate(load_recipe(torn / "selector.yaml", more), torn, tmp_path / "run")
    two = load_selectors(tmp_path / "run")
    prompts, first, second = ["was given", "to the"], ["bank", "books"], ["school", "money"]
    margins = two.margins(prompts, first, second)
    assert margins.shape == (2, 2) and not np.allclose(margins[0], margins[1])
    assert two.margins(prompts, second, first) == pytest.approx(-margins, abs=1e-4)
    wanted = (margins > 0).mean(axis=0)
    assert two.vote(prompts, first, second).tolist() == wanted.tolist()
    federate(
        load_recipe(torn / "selector.yaml", [*more, "federation.algorithm={name: fedavg}"]), torn, tmp_path / "one"
    )
    assert load_selectors(tmp_path / "one").margins(prompts, first, second).shape == (1, 2)
    with pytest.raises(DataError, match="give two to every prompt"):
        two.vote(prompts, first, second[:1])
    (tmp_path / "recipe.yaml").write_text((torn / "reward.yaml").read_text())
    with pytest.raises(ModelError, match="selectors come from 'selector'"):
        load_selectors(tmp_path)


def test_a_warm_up_without_groups_after_it_is_refused(torn: Path) -> None:
    with pytest.raises(RecipeError, match="the warm-up of 3 models takes 9 rounds"):
        load_recipe(torn / "reward.yaml", ["federation.algorithm.clusters=3", "federation.algorithm.warm_rounds=3"])
