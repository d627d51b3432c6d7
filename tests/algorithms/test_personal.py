"""Ditto, FedRep and IFCA on quadratics, where what each silo ends with has a closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedlm.algorithms import get_algorithm
from fedlm.errors import RecipeError
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
    spec = AlgorithmSpec(name="ifca", cluster_noise=0.5)
    first = {name: torch.full_like(value, 0.01 * seed) for name, value in FIRST.items()}
    federation = ToyFederation(silos, spec, first, optimizer=adamw(0.2))
    for _ in range(30):
        federation.round()
    one, other = federation.figures["clusters"]
    assert sorted([one, other]) == [["silo-0", "silo-2", "silo-4"], ["silo-1", "silo-3", "silo-5"]]
    for i, silo in enumerate(silos):
        assert (federation.loaded(i).double() - silo.b).norm() < 0.5
    # The exported model is that of the cluster whose silos weigh most: 2 + 4 + 6 against 1 + 3 + 5.
    exported = torch.cat(list(federation.algorithm.exported(federation.theta, federation.server).values()))
    assert torch.equal(exported, federation.loaded(1))


def test_a_clusters_step_is_fedavg_among_those_who_chose_it() -> None:
    silos, _ = planted(4, 1)
    federation = ToyFederation(silos, AlgorithmSpec(name="ifca", cluster_noise=0.5), FIRST)
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


def test_starts_differ_in_b_alone_and_follow_the_seed() -> None:
    spec, a, b = AlgorithmSpec(name="ifca", clusters=3), "x.lora_A.weight", "x.lora_B.weight"
    starts = []
    for seed in (0, 1):
        values = {a: torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)), b: torch.zeros(4, 2)}
        starts.append(get_algorithm(spec, AdapterSpec(rank=2)).initial(lambda values=values: dict(values)))
    assert torch.equal(starts[0][f"cluster/0/{a}"], starts[0][f"cluster/2/{a}"])
    noise = torch.cat([starts[s][f"cluster/{j}/{b}"].flatten() for s in (0, 1) for j in range(3)]).view(6, -1)
    assert torch.unique(noise, dim=0).shape[0] == 6
    assert 0.005 < noise.std() < 0.02
