"""The LoRA family on real silos of a tiny model: what silos load after a round against the mean of what they trained.

AdamW, unequal weights, alpha != rank, four rounds. Fed-SB and FedSA-LoRA have files of their own; resuming is in
`test_every_method`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.algorithms.rolora import turn
from fedlm.federation.rundir import RunDir
from fedlm.messages import Tensors
from fedlm.models.export import load_adapter
from tests.algorithms.observed import Observed, distance, effective, federate
from tests.federation.conftest import Tiny

ROUNDS, RANK = 4, 4
EXACT = ("ffa-lora", "rolora", "fedsvd", "fedex-lora", "flora")
BIASED = ("fedit", "fedrot-lora", "lora-fair", "flexlora")
SHARED = (*EXACT, *BIASED)
Run = tuple[Observed, RunDir]


def changes(name: str, *more: str) -> tuple[str, ...]:
    return (
        f"federation.algorithm.name={name}",
        f"adapter={{rank: {RANK}, alpha: 12.0}}",
        "training.lr=0.02",
        "training.steps=6",
        *more,
    )


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("family")
    return {name: federate(tiny.recipe(*changes(name)), tiny.base, folder / name) for name in SHARED}


def reported(run: RunDir, round_: int) -> float:
    """What rounds.jsonl says of a round."""
    (line,) = [line for line in run.rounds() if line["round"] == round_]
    return float(line["aggregation"]["aggregation_error"])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_exact_methods_lose_nothing(runs: dict[str, Run], name: str) -> None:
    engine, run = runs[name]
    for round_ in range(ROUNDS):
        one, other, *_ = engine.trained[round_].values()
        assert distance(one, other) > 0.02, "the silos learnt different things"
        assert engine.error(round_) < 1e-6
        assert reported(run, round_) < 1e-6


@pytest.mark.parametrize("name", BIASED)
def test_averaged_factors_are_not_the_average_change(runs: dict[str, Run], name: str) -> None:
    engine, run = runs[name]
    for round_ in range(ROUNDS):
        assert engine.error(round_) > 1e-3
        assert reported(run, round_) == pytest.approx(engine.error(round_), rel=1e-4)


@pytest.mark.parametrize("name", SHARED)
def test_it_learns(runs: dict[str, Run], name: str) -> None:
    losses = [line["validation"]["loss"] for line in runs[name][1].rounds()]
    assert losses[-1] < losses[0] - 0.1
    assert len(set(runs[name][0].weights[0].values())) == 4, "unequal weights"


@pytest.mark.parametrize("name", SHARED)
def test_what_is_exported_is_what_silos_loaded(runs: dict[str, Run], name: str) -> None:
    engine, run = runs[name]
    best = run.load_checkpoint().progress.best_round  # type: ignore[union-attr]
    engine.bench.put(load_adapter(run.adapter, engine.bench.recipe.adapter))
    assert distance(effective(engine.bench.model), next(iter(engine.loaded[best].values()))) < 1e-6


@pytest.mark.parametrize("name", SHARED)
def test_one_silo_is_local_training(name: str, tiny: Tiny, tmp_path: Path) -> None:
    of = tiny.recipe(*changes(name, "data.partition={kind: iid, silos: 1}", "federation.rounds=3"))
    engine, _ = federate(of, tiny.base, tmp_path / "run")
    for round_ in range(3):
        (trained,) = engine.trained[round_].values()
        assert distance(next(iter(engine.loaded[round_].values())), trained) < 1e-6


def test_what_travels(runs: dict[str, Run]) -> None:
    """FFA-LoRA: B both ways. RoLoRA: the factor in turn goes up. FedSVD: B goes up, both come down."""

    def factors(tensors: Tensors) -> str:
        return "".join(f for f in "AB" if any(f".lora_{f}." in n for n in tensors))

    for name, up, down in (
        ("fedit", ["AB"] * 4, "AB"),
        ("ffa-lora", ["B"] * 4, "B"),
        ("rolora", ["B", "A", "B", "A"], "AB"),
        ("fedsvd", ["B"] * 4, "AB"),
    ):
        engine, _ = runs[name]
        assert [factors(next(iter(engine.updates[r].values()))) for r in range(ROUNDS)] == up
        assert {factors(sent) for sent in (*engine.tensors.values(), *engine.broadcasts.values())} == {down}


def test_the_factor_that_waits_keeps_its_bits(runs: dict[str, Run]) -> None:
    """In RoLoRA, so that `downlink: {send: changed}` need not send it again."""
    engine, _ = runs["rolora"]
    for round_ in range(1, ROUNDS):
        before, after = engine.tensors[round_ - 1], engine.tensors[round_]
        assert all(torch.equal(before[n], after[n]) is (f".lora_{turn(round_)}." not in n) for n in after)


def test_the_corrected_b_has_a_smaller_error_than_the_mean_b(runs: dict[str, Run]) -> None:
    """Both from the same silos' factors, in every round."""
    engine, _ = runs["lora-fair"]
    for round_ in range(ROUNDS):
        before, weights = engine.tensors[round_ - 1], engine.weights[round_]
        mean = {n: sum(weights[s] * (t + u[n]) for s, u in engine.updates[round_].items()) for n, t in before.items()}
        mean = {n: t / sum(weights.values()) for n, t in mean.items()}
        loaded = next(iter(engine.loaded[round_].values()))
        averaged = {n: 3.0 * (mean[f"{n}.lora_B.weight"] @ mean[f"{n}.lora_A.weight"]).double() for n in loaded}
        assert engine.error(round_) < 0.97 * distance(averaged, engine.mean(round_))


def test_a_has_orthonormal_rows_after_every_svd(runs: dict[str, Run]) -> None:
    engine, _ = runs["fedsvd"]
    for round_ in range(ROUNDS):
        for name, a in engine.tensors[round_].items():
            if ".lora_A." in name:
                torch.testing.assert_close(a @ a.t(), torch.eye(RANK), rtol=0, atol=1e-5)
                assert not torch.equal(a, engine.tensors[round_ - 1][name])


def test_rank_stabilised_scaling(tiny: Tiny, tmp_path: Path) -> None:
    """rsLoRA's alpha / sqrt(r), in what silos load and in what the error is measured on."""
    recipe = tiny.recipe(*changes("fedit", "adapter.rslora=true", "federation.rounds=2", "training.lr=0.01"))
    engine, run = federate(recipe, tiny.base, tmp_path / "run")
    sent = engine.tensors[1]
    for name, change in next(iter(engine.loaded[1].values())).items():
        product = sent[f"{name}.lora_B.weight"].double() @ sent[f"{name}.lora_A.weight"].double()
        torch.testing.assert_close(change, 12.0 / RANK**0.5 * product, rtol=1e-6, atol=0)
    assert reported(run, 1) == pytest.approx(engine.error(1), rel=1e-4)
