"""FedSA-LoRA on real silos: A is shared, every silo is measured with its own B, and only it has seen it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.algorithms.base import Place
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.state import StateStore
from fedlm.messages import Tensors
from fedlm.models.export import load_adapter
from tests.algorithms.observed import Observed, distance, federate, final
from tests.federation.conftest import Tiny

ROUNDS = 4
CHANGES = (
    "federation.algorithm.name=fedsa-lora",
    "adapter={rank: 4, alpha: 12.0}",
    "training.lr=0.02",
    "training.steps=6",
)


@pytest.fixture(scope="module")
def observed(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Observed, RunDir]:
    return federate(tiny.recipe(*CHANGES), tiny.base, tmp_path_factory.mktemp("fedsa") / "run")


def own_b(run: RunDir, silo: str) -> Tensors:
    """B_i of a silo after the last round."""
    held = StateStore(run.path / "silos", silo).load(run.run, ROUNDS - 1)
    assert held is not None
    return held.rule


def test_a_is_the_weighted_mean_and_alone_travels(observed: tuple[Observed, RunDir]) -> None:
    engine, _ = observed
    for round_ in range(ROUNDS):
        before, after, weights = engine.tensors[round_ - 1], engine.tensors[round_], engine.weights[round_]
        assert len(after) == 14 and all(".lora_A." in name for name in after)
        for name in after:
            updates = {silo: update[name].double() for silo, update in engine.updates[round_].items()}
            mean = sum(weights[s] / sum(weights.values()) * u for s, u in updates.items())
            torch.testing.assert_close(after[name].double() - before[name], mean, rtol=0, atol=1e-6)
            assert mean.abs().max() > 1e-3
        assert all(set(update) == set(after) for update in engine.updates[round_].values())


def test_a_silo_is_measured_with_its_own_b(observed: tuple[Observed, RunDir]) -> None:
    engine, run = observed
    loaded = engine.loaded[ROUNDS - 1]
    for silo, model in loaded.items():
        b = own_b(run, silo)
        for layer, change in model.items():
            a = engine.tensors[ROUNDS - 1][f"{layer}.lora_A.weight"].double()
            torch.testing.assert_close(change, 3.0 * b[f"{layer}.lora_B.weight"].double() @ a, rtol=0, atol=1e-6)
    one, other, *_ = loaded.values()
    assert distance(one, other) > 0.1
    losses = [line["validation"]["loss"] for line in run.rounds()]
    assert losses[-1] < losses[0] - 0.1


def test_the_next_round_begins_with_the_silos_own_b(observed: tuple[Observed, RunDir]) -> None:
    engine, run = observed
    bench, received, state = engine.bench, engine.tensors[ROUNDS - 1], own_b(run, "site1")
    start = bench.algorithm.local(received, state, Place("site1", ROUNDS)).start()
    assert start.keys() == received.keys() | state.keys() and all(torch.equal(start[n], state[n]) for n in state)
    assert bench.algorithm.measured(received, {}, Place("site1")) == received, "B = 0, its first value"


def test_what_is_exported_has_no_silos_b(observed: tuple[Observed, RunDir]) -> None:
    engine, run = observed
    adapter = load_adapter(run.adapter, engine.bench.recipe.adapter)
    assert all(torch.equal(adapter[n], t) for n, t in engine.tensors[ROUNDS - 1].items())
    assert not any(t.any() for n, t in adapter.items() if ".lora_B." in n)


def test_resumed_it_ends_in_the_same_bits(tiny: Tiny, tmp_path: Path, observed: tuple[Observed, RunDir]) -> None:
    engine, resumed = federate(tiny.recipe(*CHANGES), tiny.base, tmp_path / "run", interrupt=2)
    one, other = final(observed[1]), final(resumed)
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    for silo in engine.silos():
        b, c = own_b(observed[1], silo), own_b(resumed, silo)
        assert all(torch.equal(b[n], c[n]) for n in b)


def test_one_silo_is_local_training(tiny: Tiny, tmp_path: Path) -> None:
    of = tiny.recipe(*CHANGES, "data.partition={kind: iid, silos: 1}", "federation.rounds=3")
    engine, _ = federate(of, tiny.base, tmp_path / "run")
    for round_ in range(3):
        (trained,) = engine.trained[round_].values()
        assert distance(next(iter(engine.loaded[round_].values())), trained) < 1e-6
