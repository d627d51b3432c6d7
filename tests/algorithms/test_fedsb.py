"""Fed-SB on a real (tiny) model: the directions of the first gradient, exact aggregation, bytes, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlm.errors import RecipeError
from fedlm.federation.rundir import RunDir
from fedlm.models.export import load_adapter
from fedlm.models.load import load_base
from fedlm.training.batches import batches
from fedlm.training.forward import padded_nll
from fedlm.training.objective import sequences_of
from fedlm.training.sketch import LEFT, RIGHT, factors
from tests.algorithms.observed import Observed, distance, effective, federate, final
from tests.federation.conftest import Tiny

RANK, ROUNDS = 4, 4
CHANGES = (
    "federation.algorithm.name=fed-sb",
    "adapter={kind: lora-sb, rank: 4, alpha: 12.0}",
    "training.lr=0.02",
)


@pytest.fixture(scope="module")
def observed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Observed, RunDir]:
    return federate(tiny.recipe(*CHANGES), tiny.base, tmp_path_factory.mktemp("fedsb") / "run")


def test_the_aggregate_is_the_mean_of_what_the_silos_trained(observed: tuple[Observed, RunDir]) -> None:
    engine, run = observed
    assert len(set(engine.weights[1].values())) == 4, "unequal weights"
    lines = run.rounds()
    for round_ in range(1, ROUNDS):
        assert engine.error(round_) < 1e-6
        assert lines[round_ + 1]["aggregation"]["aggregation_error"] < 1e-6
        models = list(engine.trained[round_].values())
        assert distance(models[0], models[1]) > 0.1, "the silos learnt different things"
    assert lines[1]["aggregation"] == {"aggregation_error": None}
    losses = [line["validation"]["loss"] for line in lines]
    assert losses[1] == losses[0], "after round 0 the model is the base"
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[1] - 0.1


def test_a_and_b_stay_what_round_0_made_of_the_mean_gradient(observed: tuple[Observed, RunDir]) -> None:
    """They hold nearly all that a rank of 4 can hold of the dense mean gradient, and never change a bit."""
    engine, _ = observed
    recipe, sent = engine.bench.recipe, engine.tensors[ROUNDS - 1]
    assert all(torch.equal(sent[n], t) for n, t in engine.tensors[0].items() if ".lora_R." not in n)
    total = sum(engine.weights[0].values())
    name = next(n.removesuffix(".lora_A.weight") for n in sent if n.endswith(".lora_A.weight"))
    y, z = (
        sum(rows / total * engine.updates[0][silo][f"{name}.{part}"] for silo, rows in engine.weights[0].items())
        for part in (LEFT, RIGHT)
    )
    for part, basis in zip("BA", factors(y, z, RANK), strict=True):
        torch.testing.assert_close(sent[f"{name}.lora_{part}.weight"], basis, rtol=0, atol=1e-4)
    mean: dict[str, Tensor] = {}
    for silo, rows in engine.weights[0].items():
        model, data = load_base(recipe.model), engine.bench.training_tokens(silo)
        weights = {n: m.weight for n, m in model.named_modules() if f"{n}.lora_A.weight" in sent}
        for weight in weights.values():
            weight.requires_grad_()
        key = (recipe.seed, silo)
        padded_nll(
            model, sequences_of([data[i] for s in batches(recipe.training, data.lengths, key, 0) for i in s])
        ).mean().backward()
        for name, weight in weights.items():
            mean[name] = mean.get(name, torch.zeros(())) + rows / total * weight.grad
    assert len(mean) == 14
    captured, best = torch.zeros(()), torch.zeros(())
    for name, gradient in mean.items():
        a, b = sent[f"{name}.lora_A.weight"], sent[f"{name}.lora_B.weight"]
        torch.testing.assert_close(a @ a.t(), torch.eye(RANK), rtol=0, atol=1e-5)
        torch.testing.assert_close(b.t() @ b, torch.eye(RANK), rtol=0, atol=1e-5)
        captured += (b.t() @ gradient @ a.t()).square().sum()
        best += torch.linalg.svdvals(gradient)[:RANK].square().sum()
    assert 0.9 < captured / best <= 1 + 1e-5


def test_an_update_is_r_squared_numbers_a_layer(observed: tuple[Observed, RunDir]) -> None:
    engine, _ = observed
    for round_ in range(1, ROUNDS):
        for update in engine.updates[round_].values():
            assert {n: list(t.shape) for n, t in update.items()} == {"lora_R.weight": [14, RANK, RANK]}
    first = engine.updates[0]["site0"]
    sides = sum(len(t) if n.endswith("_Y") else t.shape[1] for n, t in first.items())
    assert sum(t.numel() for t in first.values()) == 2 * RANK * sides, "twice a LoRA update, once"


def test_what_is_exported_is_plain_lora_that_acts_alike(observed: tuple[Observed, RunDir]) -> None:
    engine, run = observed
    engine.bench.put(load_adapter(run.adapter, engine.bench.recipe.adapter))
    last = next(iter(engine.loaded[ROUNDS - 1].values()))
    assert distance(effective(engine.bench.model), last) < 1e-6


def test_resumed_it_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path, observed: tuple[Observed, RunDir]) -> None:
    for before in (1, 3):
        _, resumed = federate(tiny.recipe(*CHANGES), tiny.base, tmp_path / f"run{before}", interrupt=before)
        one, other = final(observed[1]), final(resumed)
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_one_silo_is_local_training_of_r(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(*CHANGES, "data.partition={kind: iid, silos: 1}", "federation.rounds=3")
    engine, _ = federate(recipe, tiny.base, tmp_path / "run")
    for round_ in (1, 2):
        (trained,) = engine.trained[round_].values()
        assert distance(next(iter(engine.loaded[round_].values())), trained) < 1e-6


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            ["federation.algorithm.name=fed-sb"],
            r"adapter.kind: 'fed-sb' trains lora-sb, not 'lora' \(that can .*fedavg",
        ),
        (["adapter.kind=lora-sb", "federation.algorithm.name=fedavg"], r"not 'lora-sb' \(that can fed-sb, lora-xs\)"),
        ([*CHANGES, "federation.rounds=1"], "federation.rounds: 'fed-sb' needs at least 2 rounds"),
        (["adapter.dora=true"], "adapter.dora: DoRA is not trained: .* no function of B A"),
    ],
)
def test_what_cannot_be_is_refused_at_load(tiny: Tiny, changes: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        tiny.recipe(*changes)
