"""FedDyn on quadratics: the paper's formulas, and the optimum that FedAvg misses."""

from __future__ import annotations

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place
from fedlm.recipe.schema import AlgorithmSpec

from .quadratic import Federation, Quadratic, quadratics, to_vector

EYE = torch.eye(6, dtype=torch.float64)


def optimum(silos: list[Quadratic]) -> torch.Tensor:
    return torch.linalg.solve(sum(s.A for s in silos), sum(s.A @ s.b for s in silos))


@pytest.mark.parametrize("alpha, sampled", [(0.5, None), (2.0, [0, 2]), (1.0, [1])])
def test_every_round_is_the_papers(alpha: float, sampled: list[int] | None) -> None:
    """Local problems solved to their end, which a quadratic has in closed form, in fp64; weights play no role."""
    silos, spec = quadratics(3), AlgorithmSpec(name="feddyn", dyn_alpha=alpha)
    federation = Federation(silos, spec, steps=150, rate=0.4 if alpha < 1 else 0.25)
    theta, h = torch.zeros(6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    g = [torch.zeros(6, dtype=torch.float64) for _ in silos]
    for number in range(6):
        who = list(range(3)) if sampled is None or number % 2 == 0 else sampled
        reached = []
        for i in who:
            theta_i = torch.linalg.solve(silos[i].A + alpha * EYE, silos[i].A @ silos[i].b + g[i] + alpha * theta)
            g[i] = g[i] - alpha * (theta_i - theta)
            reached.append(theta_i)
        h = h - alpha / 3 * sum(theta_i - theta for theta_i in reached)
        theta = sum(reached) / len(who) - h / alpha
        assert (federation.round(who).double() - theta).abs().max() < 1e-5
        for i in who:
            state = {k.removeprefix("dual/"): v for k, v in federation.silo_states[i].items()}
            assert (to_vector(state).double() - g[i]).abs().max() < 1e-5
    assert h.norm() > 1e-3


def test_it_reaches_the_true_optimum_where_fedavg_is_biased() -> None:
    """Five unlike quadratics, ten local steps: FedAvg ends 0.11 from the minimiser of the mean loss."""
    silos = quadratics(5, seed=4)
    for silo in silos:
        silo.weight = 1.0
    away = {}
    for name in ("fedavg", "feddyn"):
        federation = Federation(silos, AlgorithmSpec(name=name, dyn_alpha=1.0), steps=10, rate=0.2)
        for _ in range(300):
            reached = federation.round()
        away[name] = (reached.double() - optimum(silos)).norm().item()
    assert away["fedavg"] > 0.1, away
    assert away["feddyn"] < 1e-5, away


def test_with_a_part_of_the_silos_and_adamw_too() -> None:
    """AdamW's rate falls, since at a constant one it circles the optimum."""
    silos = quadratics(4, seed=2)
    for rate, rounds in ((None, 600), (0.05, 500)):
        federation = Federation(silos, AlgorithmSpec(name="feddyn", dyn_alpha=1.0), steps=10, rate=0.2)
        generator = torch.Generator().manual_seed(0)
        for number in range(rounds):
            if rate is not None:
                now = rate * 0.985**number
                federation.optimizer = lambda p, now=now: torch.optim.AdamW(p, lr=now, weight_decay=0.0)
            reached = federation.round(torch.randperm(4, generator=generator)[:2].sort().values.tolist())
        assert (reached.double() - optimum(silos)).norm() < (1e-4 if rate is None else 0.05)


def test_a_parameter_without_gradient_is_still_pulled() -> None:
    rule = get_algorithm(AlgorithmSpec(name="feddyn", dyn_alpha=0.5)).local(
        {"w": torch.ones(3)}, {"dual/w": torch.full((3,), 0.25)}, Place()
    )
    w = torch.nn.Parameter(torch.full((3,), 3.0))
    rule.correct({"w": w})
    assert w.grad is not None and torch.equal(w.grad, torch.full((3,), 0.5 * 2 - 0.25))
