"""HetLoRA: padding, weights, truncation, pruning, with the scales of unequal ranks; on layers and on real silos."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place
from fedlm.messages import Tensors
from fedlm.models.export import load_adapter
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec
from tests.algorithms import observed
from tests.algorithms.layer_silos import SHAPES, LayerFederation, draw, effective
from tests.algorithms.observed import federate, final
from tests.federation.conftest import Tiny

MIXED = (4, 2, 3, 1)
KEEP = {"rank_decay": 1.0}


def padded(federation: LayerFederation, layer: str) -> tuple[Tensor, Tensor]:
    """The paper's aggregate from what silos trained: A, and B times its s (fp64)."""
    norms = {
        i: sum(float(change.square().sum()) for change in federation.changes[i].values()) ** 0.5
        for i in federation.changes
    }
    d_out, d_in = SHAPES[layer]
    a, b = torch.zeros(4, d_in, dtype=torch.float64), torch.zeros(d_out, 4, dtype=torch.float64)
    for i, norm in norms.items():
        rank, w = federation.reported[i], norm / sum(norms.values())
        values = federation.values[i]
        a[:rank] += w * values[f"{layer}.lora_A.weight"][:rank]
        b[:, :rank] += w * federation.adapter.scale(federation.ranks[i]) * values[f"{layer}.lora_B.weight"][:, :rank]
    return a, b


@pytest.mark.parametrize("rslora", [False, True])
def test_factors_are_filled_up_weighted_by_their_products_norm_and_cut(rslora: bool, tmp_path: Path) -> None:
    federation = LayerFederation("hetlora", MIXED, tmp_path, rslora=rslora, options=KEEP)
    for _ in range(4):
        federation.round()
        for rank in MIXED:
            now = effective(federation.loaded(rank), federation.adapter)
            for layer in SHAPES:
                a, b = padded(federation, layer)
                torch.testing.assert_close(now[layer], b[:, :rank] @ a[:rank], rtol=0, atol=1e-5)
        errors = federation.figures["error_by_rank"]
        assert errors == {str(rank): pytest.approx(federation.error(rank), rel=1e-4) for rank in MIXED}
        assert federation.figures["aggregation_error"] == errors["4"] > 0.01


def test_a_silo_of_a_small_rank_leaves_the_ranks_beyond_alone(tmp_path: Path) -> None:
    federation = LayerFederation("hetlora", (4, 2), tmp_path, options=KEEP)
    federation.round()
    before = dict(federation.theta)
    federation.round([1])
    update = federation.updates[1]
    assert update["a.lora_A.weight"].shape == (2, 30) and update["a.lora_B.weight"].shape == (20, 2)
    for layer in SHAPES:
        a, b = federation.theta[f"{layer}.lora_A.weight"], federation.theta[f"{layer}.lora_B.weight"]
        assert not a[2:].any() and not b[:, 2:].any(), "a mean with zeros alone"
        assert not torch.equal(a[:2], before[f"{layer}.lora_A.weight"][:2])
    assert federation.error(2) < 1e-6, "one silo: what it trained is what it loads"


def test_one_silo_is_local_training(tmp_path: Path) -> None:
    federation = LayerFederation("hetlora", (4,), tmp_path, options=KEEP)
    for _ in range(3):
        federation.round()
        assert federation.error(4) < 1e-6


def rule_and_values(**options: float):
    spec, adapter = AlgorithmSpec(name="hetlora", **options), AdapterSpec(rank=8, alpha=10.0)
    received = {"a.lora_A.weight": draw(8, 30, seed=1), "a.lora_B.weight": draw(20, 8, seed=2)}
    return get_algorithm(spec, adapter).local(received, {}, Place(rank=8)), received


def test_the_penaltys_gradient_is_autograds() -> None:
    rule, received = rule_and_values(rank_decay=0.6, rank_penalty=0.3)  # 4 of 8 are kept
    values = {name: Parameter(value.clone()) for name, value in received.items()}
    a, b = values.values()
    (0.3 * a[4:].norm() * b[:, 4:].norm()).backward()
    expected = [a.grad.clone(), b.grad.clone()]
    for value in values.values():
        value.grad = torch.ones_like(value)
    rule.correct(values)
    for value, gradient in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(value.grad, 1 + gradient, rtol=1e-5, atol=1e-6)
    values["a.lora_B.weight"].data[:, 4:] = 0  # as at the start of LoRA: no direction, and no NaN
    rule.correct(values)
    assert all(torch.isfinite(value.grad).all() for value in values.values())


@pytest.mark.parametrize("shrunk", [True, False])
def test_a_rank_is_pruned_when_its_tail_shrank_in_training(shrunk: bool) -> None:
    """gamma 0.6 of 8 ranks keeps 4; what is kept acts as before, though s = alpha / r has doubled."""
    rule, received = rule_and_values(rank_decay=0.6)
    trained = {name: value.clone() for name, value in received.items()}
    trained["a.lora_A.weight"][4:] *= 0.9 if shrunk else 1.1
    trained["a.lora_A.weight"][:4] += 1.0
    update, state = rule.finish(trained)
    rank = 4 if shrunk else 8
    assert int(state["rank"]) == rank and update["a.lora_A.weight"].shape == (rank, 30)
    adapter = AdapterSpec(rank=8, alpha=10.0)
    algorithm = get_algorithm(AlgorithmSpec(name="hetlora", rank_decay=0.6), adapter)
    start = algorithm.local(algorithm.for_rank(received, rank), {}, Place(rank=rank)).start()  # the coordinator's
    a, b = (start[name] + update[name] for name in received)
    kept = 10 / 8 * trained["a.lora_B.weight"][:, :rank] @ trained["a.lora_A.weight"][:rank]
    torch.testing.assert_close(10 / rank * b @ a, kept, rtol=1e-5, atol=1e-5)
    following = algorithm.local(received, state, Place(round=1, rank=8))
    assert following.start()["a.lora_A.weight"].shape == (rank, 30), "the silo remembers"


@pytest.mark.parametrize("rank, gamma, kept", [(8, 0.99, 7), (8, 0.5, 4), (2, 0.99, 1), (1, 0.5, 1), (10, 0.7, 7)])
def test_the_rank_that_is_kept_is_rounded_down_and_never_0(rank: int, gamma: float, kept: int) -> None:
    spec, adapter = AlgorithmSpec(name="hetlora", rank_decay=gamma), AdapterSpec(rank=10, alpha=10.0)
    received: Tensors = {"a.lora_A.weight": torch.ones(rank, 3), "a.lora_B.weight": torch.ones(3, rank)}
    rule = get_algorithm(spec, adapter).local(received, {}, Place(rank=rank))
    _, state = rule.finish({name: value * 0.9 for name, value in received.items()})
    assert int(state["rank"]) == kept


def test_a_strong_penalty_prunes_over_rounds_and_the_silos_ranks_are_reported(tmp_path: Path) -> None:
    options = {"rank_decay": 0.75, "rank_penalty": 3.0}
    federation = LayerFederation("hetlora", (4, 4, 2), tmp_path, options=options)
    told = []
    for _ in range(5):
        federation.round()
        told.append(tuple(federation.reported.values()))
        assert set(federation.figures.get("error_by_rank", {})) <= {"1", "2", "3", "4"}
    assert told[0] == (4, 4, 2), "B = 0 has no tail that could shrink"
    assert all(later <= earlier for one, two in pairwise(told) for earlier, later in zip(one, two, strict=True))
    assert told[-1][0] < 4 and min(told[-1]) >= 1


# ------------------------------------------------------------------------------------------------------ real silos

CHANGES = (
    "federation.algorithm={name: hetlora, rank_decay: 0.7, rank_penalty: 3.0}",
    "adapter={rank: 4, alpha: 12.0}",
    "training.lr=0.02",
    "training.steps=6",
)


@pytest.mark.slow
def test_real_silos_prune_learn_and_resume_to_the_same_bits(tiny: Tiny, tmp_path: Path) -> None:
    engine, run = federate(tiny.recipe(*CHANGES), tiny.base, tmp_path / "run")
    resumed_engine, resumed = federate(tiny.recipe(*CHANGES), tiny.base, tmp_path / "resumed", interrupt=2)
    one, other = final(run), final(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    ranks = [
        {silo: len(next(v for n, v in update.items() if ".lora_A." in n)) for silo, update in sent.items()}
        for sent in engine.updates.values()
    ]
    assert set(ranks[0].values()) == {4} and min(ranks[-1].values()) < 4, "somebody pruned"
    assert resumed_engine.updates.keys() == engine.updates.keys()
    losses = [line["validation"]["loss"] for line in run.rounds()]
    assert losses[-1] < losses[0] - 0.1
    for line in run.rounds()[1:]:
        assert line["aggregation"]["aggregation_error"] > 1e-3
    best = run.load_checkpoint().progress.best_round  # type: ignore[union-attr]
    engine.bench.put(load_adapter(run.adapter, engine.bench.recipe.adapter))
    loaded = next(iter(engine.loaded[best].values()))
    assert observed.distance(observed.effective(engine.bench.model), loaded) < 1e-6
