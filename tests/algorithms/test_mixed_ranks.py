"""Real silos of unequal LoRA ranks under the methods that allow them: what each silo loads, against the mean of what
all have trained; AdamW, unequal weights, alpha != rank, four rounds, interrupted and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.federation.api import run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.models.export import load_adapter
from tests.algorithms.observed import Observed, distance, effective, federate, final
from tests.federation.conftest import Tiny

ROUNDS = 4
METHODS = {
    "flora": "{name: flora}",
    "flexlora": "{name: flexlora}",
    "hetlora": "{name: hetlora, rank_decay: 1.0}",
}
DEALT = (4, 2, 1, 4)
Run = tuple[Observed, RunDir]


def changes(name: str) -> tuple[str, ...]:
    return (
        f"federation.algorithm={METHODS[name]}",
        "adapter={rank: 4, alpha: 12.0}",
        f"federation.capacity={{dealt: [{', '.join(f'{{rank: {rank}}}' for rank in DEALT)}]}}",
        "training.lr=0.02",
        "training.steps=6",
    )


@pytest.fixture(scope="module")
def runs(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("mixed")
    return {name: federate(tiny.recipe(*changes(name)), tiny.base, folder / name) for name in METHODS}


def errors(run: RunDir, round_: int) -> dict[int, float]:
    """By rank, what rounds.jsonl says of a round."""
    (line,) = [line for line in run.rounds() if line["round"] == round_]
    return {int(rank): error for rank, error in line["aggregation"]["error_by_rank"].items()}


@pytest.mark.parametrize("name", METHODS)
def test_silos_send_and_load_what_their_rank_allows(runs: dict[str, Run], name: str) -> None:
    engine, run = runs[name]
    ranks = dict(zip(engine.silos(), DEALT, strict=True))
    for round_ in range(ROUNDS):
        for silo, update in engine.updates[round_].items():
            assert {value.shape[0] for n, value in update.items() if ".lora_A." in n} == {ranks[silo]}
        loaded = engine.loaded[round_]
        for silo, other in (("site0", "site3"), ("site0", "site1"), ("site1", "site2")):
            same = name == "flora" or ranks[silo] == ranks[other]
            assert (distance(loaded[silo], loaded[other]) == 0) is same
        if name != "hetlora":  # whose silos all count the same
            found = {rank: distance(loaded[silo], engine.mean(round_)) for silo, rank in ranks.items()}
            if name == "flora":
                assert max(found.values()) < 1e-6
                # Of the round's change alone, which is small at the end beside the sum of all rounds in fp32.
                assert max(errors(run, round_).values()) < 1e-5
            else:
                assert errors(run, round_) == {rank: pytest.approx(error, rel=1e-3) for rank, error in found.items()}
                assert found[4] < found[2] < found[1]


@pytest.mark.parametrize("name", METHODS)
def test_it_learns_and_resumes_to_the_same_bits(runs: dict[str, Run], name: str, tiny: Tiny, tmp_path: Path) -> None:
    _, run = runs[name]
    losses = [line["validation"]["loss"] for line in run.rounds()]
    assert losses[-1] < losses[0] - 0.1
    _, resumed = federate(tiny.recipe(*changes(name)), tiny.base, tmp_path / "run", interrupt=2)
    one, other = final(run), final(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_worker_processes_give_the_same_bits(runs: dict[str, Run], name: str, tiny: Tiny, tmp_path: Path) -> None:
    """Two of them, with the spool on disk between; and what is exported is what a silo of the largest rank loaded."""
    recipe = tiny.recipe(*changes(name), "federation.workers=2")
    assert run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run").status == "finished"
    engine, run = runs[name]
    one, other = final(run), final(RunDir.open(tmp_path / "run", write=False))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    best = run.load_checkpoint().progress.best_round  # type: ignore[union-attr]
    engine.bench.put(load_adapter(run.adapter, recipe.adapter))
    assert distance(effective(engine.bench.model), engine.loaded[best]["site0"]) < 1e-6
