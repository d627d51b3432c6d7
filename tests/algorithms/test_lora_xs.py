"""LoRA-XS: bases from the frozen weights, exact aggregation, r^2 numbers a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.federation.rundir import RunDir
from fedlm.models.export import load_adapter
from fedlm.models.load import load_base
from tests.algorithms.observed import Observed, distance, effective, federate, final
from tests.federation.conftest import Tiny

RANK, ROUNDS = 4, 4
CHANGES = (
    "federation.algorithm.name=lora-xs",
    "adapter={kind: lora-sb, rank: 4, alpha: 12.0}",
    "training.lr=0.5",  # the tiny model's weights are small, and so is what R turns
)


@pytest.fixture(scope="module")
def observed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Observed, RunDir]:
    return federate(tiny.recipe(*CHANGES), tiny.base, tmp_path_factory.mktemp("xs") / "run")


def test_s_b_a_is_the_best_that_the_rank_can_hold_of_the_weight(observed: tuple[Observed, RunDir]) -> None:
    engine, _ = observed
    sent, scale = engine.tensors[ROUNDS - 1], 12.0 / RANK
    weights = dict(load_base(engine.bench.recipe.model).named_parameters())
    layers = [name.removesuffix(".lora_A.weight") for name in sent if name.endswith(".lora_A.weight")]
    assert len(layers) == 14
    for layer in layers:
        a, b = sent[f"{layer}.lora_A.weight"], sent[f"{layer}.lora_B.weight"]
        u, s, v = torch.linalg.svd(weights[f"{layer}.weight"].double(), full_matrices=False)
        best = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
        torch.testing.assert_close(scale * (b @ a).double(), best, rtol=0, atol=1e-5 * float(s[0]))
        torch.testing.assert_close(a @ a.t(), torch.eye(RANK), rtol=0, atol=1e-5)
    assert all(torch.equal(sent[n], t) for n, t in engine.tensors[0].items() if ".lora_R." not in n)


def test_the_aggregate_is_the_mean_of_what_the_silos_trained(observed: tuple[Observed, RunDir]) -> None:
    engine, run = observed
    lines = run.rounds()
    for round_ in range(ROUNDS):
        assert engine.error(round_) < 1e-6
        assert lines[round_ + 1]["aggregation"]["aggregation_error"] < 1e-6
        for update in engine.updates[round_].values():
            assert {n: list(t.shape) for n, t in update.items()} == {"lora_R.weight": [14, RANK, RANK]}
    models = list(engine.trained[0].values())
    assert distance(models[0], models[1]) > 0.1, "the silos learnt different things"
    losses = [line["validation"]["loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.05
    engine.bench.put(load_adapter(run.adapter, engine.bench.recipe.adapter))
    last = next(iter(engine.loaded[ROUNDS - 1].values()))
    assert distance(effective(engine.bench.model), last) < 1e-6, "exported it is plain LoRA that acts alike"


def test_resumed_it_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path, observed: tuple[Observed, RunDir]) -> None:
    _, resumed = federate(tiny.recipe(*CHANGES), tiny.base, tmp_path / "run", interrupt=2)
    one, other = final(observed[1]), final(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
