"""Ditto, FedRep and IFCA on quadratics, where what each silo ends with has a closed form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.ifca import grouped
from fedlm.errors import RecipeError, TrainingError
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

from .quadratic import Quadratic, quadratics
from .toy_session import ToyFederation

FIRST = {"model.layers.0.x": torch.zeros(4), "model.layers.1.x": torch.zeros(2)}
EYE = torch.eye(6, dtype=torch.float64)


def adamw(rate: float):
    return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


# ---------------------------------------------------------------- Ditto


def drawn(silo: Quadratic, theta: Tensor, strength: float) -> Tensor:
    """argmin_v f(v) + lambda/2 |v - theta|^2."""
    return torch.linalg.solve(silo.A + strength * EYE, silo.A @ silo.b + strength * theta.double())


@pytest.mark.parametrize("strength", [0.0, 0.3, 2.0])
def test_dittos_personal_models_are_the_closed_form(strength: float) -> None:
    silos = quadratics(4)
    federation = ToyFederation(silos, AlgorithmSpec(name="ditto", ditto_lambda=strength), FIRST)
    plain = ToyFederation(silos, AlgorithmSpec(name="fedavg"), FIRST)
    for _ in range(150):
        federation.round()
        plain.round()
        for name, value in plain.theta.items():
            assert torch.equal(federation.theta[name], value), "the global model is FedAvg's"
    theta = torch.cat(list(federation.theta.values()))
    for i, silo in enumerate(silos):
        assert (federation.loaded(i).double() - drawn(silo, theta, strength)).abs().max() < 1e-6
    spread = (federation.loaded(0) - federation.loaded(1)).norm()
    assert spread > 0.1, "silos differ"


def test_every_step_of_dittos_personal_model_is_the_papers() -> None:
    """Three rounds of K = 4 steps from the model of the round before, in fp64 by hand; theta is the round's first."""
    silos, strength, eta = quadratics(3, seed=5), 0.7, 0.2
    federation = ToyFederation(silos, AlgorithmSpec(name="ditto", ditto_lambda=strength), FIRST)
    v = [torch.zeros(6, dtype=torch.float64) for _ in silos]
    for _ in range(3):
        theta = torch.cat(list(federation.theta.values())).double()
        federation.round()
        for i, silo in enumerate(silos):
            for _ in range(4):
                v[i] = v[i] - eta * (silo.gradient(v[i]) + strength * (v[i] - theta))
            assert (federation.loaded(i).double() - v[i]).abs().max() < 1e-6


def test_a_silo_that_never_trained_measures_the_global_model() -> None:
    federation = ToyFederation(quadratics(3), AlgorithmSpec(name="ditto"), FIRST)
    for _ in range(3):
        federation.round(sampled=[0, 1])
    assert torch.equal(federation.loaded(2), torch.cat(list(federation.theta.values())))
    assert not torch.equal(federation.loaded(0), federation.loaded(2))


# ---------------------------------------------------------------- FedRep


def test_fedrep_shares_the_body_and_keeps_the_heads() -> None:
    """Silos agree on the first four numbers and on nothing in the last two: FedRep finds both, FedAvg cannot."""
    common = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    silos = []
    for i, silo in enumerate(quadratics(4, seed=6)):
        own = torch.randn(2, generator=torch.Generator().manual_seed(i + 1), dtype=torch.float64)
        silos.append(Quadratic(silo.A, torch.cat([common, own]), silo.weight))
    federation = ToyFederation(silos, AlgorithmSpec(name="fedrep"), FIRST, steps=6)
    plain = ToyFederation(silos, AlgorithmSpec(name="fedavg"), FIRST, steps=6)
    for _ in range(150):
        federation.round()
        plain.round()
    assert list(federation.theta) == ["model.layers.0.x"], "heads never leave their silos"
    for i, silo in enumerate(silos):
        assert (federation.loaded(i).double() - silo.b).norm() < 1e-4
        assert (plain.loaded(i).double() - silo.b).norm() > 0.3


def test_fedrep_trains_the_head_first_and_then_the_body() -> None:
    """By hand in fp64: of five steps two for the head at the body received, three for the body at the new head."""
    silos, eta = quadratics(2, seed=7), 0.2
    spec = AlgorithmSpec(name="fedrep", head_share=0.4)
    federation = ToyFederation(silos, spec, FIRST, steps=5)
    body, heads = torch.zeros(4, dtype=torch.float64), [torch.zeros(2, dtype=torch.float64) for _ in silos]
    for _ in range(3):
        federation.round()
        bodies = []
        for i, silo in enumerate(silos):
            w = torch.cat([body, heads[i]])
            for step in range(5):
                change = eta * silo.gradient(w)
                change[slice(0, 4) if step < 2 else slice(4, 6)] = 0
                w = w - change
            bodies.append(w[:4] * silo.weight)
            heads[i] = w[4:]
        body = sum(bodies) / sum(silo.weight for silo in silos)
        for i in range(2):
            assert (federation.loaded(i).double() - torch.cat([body, heads[i]])).abs().max() < 1e-6


def test_fedrep_with_one_step_a_round_is_refused() -> None:
    """One part would never be trained, and an update of zeros would hold the mean back."""
    with pytest.raises(TrainingError, match="at least 2 steps a round, one for each part"):
        ToyFederation(quadratics(1), AlgorithmSpec(name="fedrep"), FIRST, steps=1).round()


def test_an_adaptive_optimiser_leaves_the_other_part_alone() -> None:
    """AdamW has momentum and decay, which must not move what it is not that part's turn for."""
    seen: list[Tensor] = []

    class Watched(torch.optim.AdamW):
        def step(self, closure=None):  # type: ignore[override, no-untyped-def]
            super().step(closure)
            seen.append(torch.cat([p.detach().clone() for p in self.param_groups[0]["params"]]))

    ones = {name: torch.ones_like(value) for name, value in FIRST.items()}
    federation = ToyFederation(quadratics(1), AlgorithmSpec(name="fedrep"), ones, steps=4)
    federation.optimizer = lambda parameters: Watched(parameters, lr=0.1, weight_decay=0.5)
    federation.round()
    assert torch.equal(seen[0][:4], torch.ones(4)) and torch.equal(seen[1][:4], torch.ones(4))
    assert torch.equal(seen[3][4:], seen[1][4:]) and not torch.equal(seen[3][:4], seen[1][:4])


NAMES = [f"model.layers.{i}.self_attn.q_proj.lora_{f}.weight" for i in range(12) for f in "AB"]


@pytest.mark.parametrize(
    "part, expected",
    [
        (1, {n for n in NAMES if ".11." in n}),
        (3, {n for n in NAMES if any(f".{i}." in n for i in (9, 10, 11))}),
        ("lora_B", {n for n in NAMES if "lora_B" in n}),
        ("lora_A", {n for n in NAMES if "lora_A" in n}),
    ],
)
def test_the_personal_part_by_name(part: str | int, expected: set[str]) -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="fedrep", personal_part=part))
    shared = algorithm.initial(lambda: {name: torch.zeros(1) for name in NAMES})
    assert set(NAMES) - set(shared) == expected


@pytest.mark.parametrize("part, what", [(12, "everything"), ("lora_B", "nothing")])
def test_a_personal_part_that_leaves_nothing_is_refused(part: str | int, what: str) -> None:
    names = NAMES if part == 12 else ["model.layers.0.mlp.down_proj.ia3_l"]
    algorithm = get_algorithm(AlgorithmSpec(name="fedrep", personal_part=part))
    with pytest.raises(RecipeError, match=what):
        algorithm.initial(lambda: {name: torch.zeros(1) for name in names})


# ---------------------------------------------------------------- IFCA


def planted(silos: int, seed: int) -> tuple[list[Quadratic], list[Tensor]]:
    """Silos around one of two far centres, the even ones around the first."""
    centres = [torch.full((6,), 2.0, dtype=torch.float64), torch.full((6,), -2.0, dtype=torch.float64)]
    made = quadratics(silos, seed=seed)
    return [Quadratic(s.A, centres[i % 2] + 0.1 * s.b, s.weight) for i, s in enumerate(made)], centres


@pytest.mark.parametrize("seed", range(4))
def test_ifca_recovers_planted_clusters(seed: int) -> None:
    silos, _ = planted(6, seed)
    federation = ToyFederation(silos, AlgorithmSpec(name="ifca"), FIRST, optimizer=adamw(0.2))
    for _ in range(30):
        federation.round()
        one, other = federation.figures["clusters"]
        assert sorted([one, other]) == [["silo-0", "silo-2", "silo-4"], ["silo-1", "silo-3", "silo-5"]]
    for i, silo in enumerate(silos):
        assert (federation.loaded(i).double() - silo.b).norm() < 0.5
    # The exported model is that of the cluster whose silos weigh most: 2 + 4 + 6 against 1 + 3 + 5.
    exported = torch.cat(list(federation.algorithm.exported(federation.theta, federation.server).values()))
    assert torch.equal(exported, federation.loaded(1))


def test_a_silo_changes_its_cluster_when_another_fits_better() -> None:
    """Silo 3 is grouped by its first direction with those of the other centre, and finds home by its loss."""
    silos, centres = planted(6, 1)
    silos[3] = Quadratic(silos[3].A, 0.9 * centres[0], silos[3].weight)
    federation = ToyFederation(silos, AlgorithmSpec(name="ifca"), FIRST)
    federation.round()
    federation.theta = {n: -v for n, v in federation.theta.items()}  # the two models change places
    federation.round()
    one, other = federation.figures["clusters"]
    assert sorted([one, other]) == [["silo-0", "silo-2", "silo-3", "silo-4"], ["silo-1", "silo-5"]]


def test_a_clusters_step_is_fedavg_among_those_who_chose_it() -> None:
    silos, _ = planted(4, 1)
    federation = ToyFederation(silos, AlgorithmSpec(name="ifca", clusters=3), FIRST)
    for _ in range(5):
        before = {name: value.clone() for name, value in federation.theta.items()}
        federation.round()
        for j, members in enumerate(federation.figures["clusters"]):
            now = {n: federation.theta[f"cluster/{j}/{n}"] for n in FIRST}
            then = {n: before[f"cluster/{j}/{n}"] for n in FIRST}
            if not members:
                assert all(torch.equal(now[n], then[n]) for n in FIRST), "nobody chose it: it stays"
                continue
            chosen = [silos[int(name.removeprefix("silo-"))] for name in members]
            alone = ToyFederation(chosen, AlgorithmSpec(name="fedavg"), then)
            for name, value in alone.round().items():
                torch.testing.assert_close(now[name], value, rtol=0, atol=1e-6)


def test_after_round_0_a_silo_knows_its_cluster_by_what_it_trained() -> None:
    silos, _ = planted(4, 3)
    federation = ToyFederation(silos, AlgorithmSpec(name="ifca"), FIRST)
    federation.round()
    for j, members in enumerate(federation.figures["clusters"]):
        model = torch.cat([federation.theta[f"cluster/{j}/{n}"] for n in FIRST])
        assert members and all(torch.equal(federation.loaded(int(m.removeprefix("silo-"))), model) for m in members)


def test_grouping_by_direction() -> None:
    """Lengths play no role; three directions with noise; the order of the vectors none but for the groups' numbers."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(50, 3, generator=g))[0].T
    true = [i % 3 for i in range(30)]
    vectors = [(1 + i) * (axes[t] + 0.08 * torch.randn(50, generator=g)) for i, t in enumerate(true)]
    found = grouped(lambda: iter(vectors), 3)
    assert len(set(zip(true, found, strict=True))) == 3 == len(set(found))
    turned = grouped(lambda: reversed(vectors), 3)
    assert len(set(zip(found, reversed(turned), strict=True))) == 3
    assert grouped(lambda: iter(vectors[:2]), 5) == [0, 1]
    assert grouped(lambda: iter([vectors[0], 3 * vectors[0]]), 2) == [0, 0], "alike vectors are one group"


def test_of_lora_directions_are_those_of_b() -> None:
    a, b = "x.lora_A.weight", "x.lora_B.weight"
    algorithm = get_algorithm(AlgorithmSpec(name="ifca"), AdapterSpec(rank=2))
    theta = algorithm.initial(lambda: {a: torch.ones(2, 5), b: torch.zeros(4, 2)})
    accumulator = algorithm.accumulator(Path())
    for i, sign in enumerate([1.0, -1.0, 1.0, -1.0]):
        noise = 100 * torch.randn(2, 5, generator=torch.Generator().manual_seed(i))
        update = {a: noise, b: torch.full((4, 2), sign), "choice": torch.tensor([1.0, 0.0])}
        algorithm.fold(accumulator, update, 1.0, Place(f"silo-{i}", 0, rank=2))
    after = algorithm.server_step(theta, accumulator, algorithm.init_state(theta), Step(0, 4))
    clusters = algorithm.measure((theta, {}), accumulator, after, 0)["clusters"]
    assert clusters == [["silo-0", "silo-2"], ["silo-1", "silo-3"]]
