"""FedAvg, FedProx and SCAFFOLD against closed forms on quadratics."""

from __future__ import annotations

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place
from fedlm.recipe.schema import AlgorithmSpec

from .quadratic import Federation, Quadratic, quadratics, sgd, to_tensors, to_vector, train

EYE = torch.eye(6, dtype=torch.float64)
K, ETA = 4, 0.2


def closed_form(silos: list[Quadratic], theta: torch.Tensor, mu: float) -> torch.Tensor:
    """The model after one round of K SGD steps on f_i + mu/2 |w - theta|^2 in each silo, in float64.

    The local minimiser is b' = (A + mu I)^-1 (A b + mu theta), and w_K = b' + (I - eta (A + mu I))^K (theta - b').
    """
    total = sum(silo.weight for silo in silos)
    mean = torch.zeros_like(theta)
    for silo in silos:
        curvature = silo.A + mu * EYE
        minimiser = torch.linalg.solve(curvature, silo.A @ silo.b + mu * theta)
        reached = minimiser + torch.linalg.matrix_power(EYE - ETA * curvature, K) @ (theta - minimiser)
        mean += silo.weight / total * reached
    return mean


@pytest.mark.parametrize("name, mu", [("fedavg", 0.0), ("fedprox", 0.0), ("fedprox", 0.3), ("fedprox", 2.0)])
def test_every_round_is_the_closed_form(name: str, mu: float) -> None:
    silos = quadratics(5)
    federation = Federation(silos, AlgorithmSpec(name=name, mu=mu), steps=K, rate=ETA)
    expected = torch.zeros(6, dtype=torch.float64)
    for _ in range(12):
        expected = closed_form(silos, expected, mu)
        assert (federation.round().double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("name, mu", [("fedavg", 0.0), ("fedprox", 0.5)])
def test_many_rounds_reach_the_closed_forms_fixed_point(name: str, mu: float) -> None:
    silos = quadratics(4, seed=1)
    federation = Federation(silos, AlgorithmSpec(name=name, mu=mu), steps=K, rate=ETA)
    for _ in range(120):
        reached = federation.round()
    # A round is affine, theta -> M theta + v, so its fixed point is (I - M)^-1 v.
    v = closed_form(silos, torch.zeros(6, dtype=torch.float64), mu)
    M = torch.stack([closed_form(silos, e, mu) - v for e in EYE], dim=1)  # noqa: N806
    assert (reached.double() - torch.linalg.solve(EYE - M, v)).abs().max() < 1e-6


def test_fedprox_without_its_term_is_fedavg_to_the_bit() -> None:
    runs = [Federation(quadratics(3), AlgorithmSpec(name=n, mu=0.0)) for n in ("fedavg", "fedprox")]
    for _ in range(5):
        one, other = (run.round() for run in runs)
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedavgm"])
def test_the_server_rate_scales_the_step(name: str) -> None:
    whole = Federation(quadratics(3), AlgorithmSpec(name=name))
    half = Federation(quadratics(3), AlgorithmSpec(name=name, server_lr=0.5))
    torch.testing.assert_close(half.round(), whole.round() / 2, rtol=0, atol=1e-7)


def scaffold_round_inputs() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    theta, c, c_i = (torch.randn(6, generator=generator) * 0.3 for _ in range(3))
    received = to_tensors(theta) | {f"variate/{k}": v for k, v in to_tensors(c).items()}
    return received, {f"variate/{k}": v for k, v in to_tensors(c_i).items()}


def variates(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return to_vector({k.removeprefix("variate/"): v for k, v in tensors.items() if k.startswith("variate/")})


def test_scaffolds_variate_is_option_two_for_plain_sgd() -> None:
    received, state = scaffold_round_inputs()
    algorithm = get_algorithm(AlgorithmSpec(name="scaffold"))
    update, new_state, _ = train(algorithm, received, state, quadratics(1)[0], steps=K, optimizer=sgd(ETA))
    x_minus_y = -to_vector(update)
    option_two = variates(state) - variates(received) + x_minus_y / (K * ETA)
    torch.testing.assert_close(variates(new_state), option_two, rtol=0, atol=1e-6)
    torch.testing.assert_close(variates(update), option_two - variates(state), rtol=0, atol=1e-6)


def test_scaffolds_variate_is_the_mean_gradient_for_every_optimiser() -> None:
    received, state = scaffold_round_inputs()
    algorithm = get_algorithm(AlgorithmSpec(name="scaffold"))
    update, new_state, gradients = train(
        algorithm, received, state, quadratics(1)[0], steps=K, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01)
    )
    torch.testing.assert_close(variates(new_state), torch.stack(gradients).mean(0), rtol=0, atol=1e-6)
    option_two = variates(state) - variates(received) - to_vector(update) / (K * 0.01)
    assert (variates(new_state) - option_two).abs().max() > 0.1, "the paper's formula is no gradient under AdamW"


def test_a_round_without_steps_keeps_the_variate() -> None:
    received, state = scaffold_round_inputs()
    algorithm = get_algorithm(AlgorithmSpec(name="scaffold"))
    update, new_state, _ = train(algorithm, received, state, quadratics(1)[0], steps=0, optimizer=sgd(ETA))
    assert torch.equal(variates(new_state), variates(state))
    assert not variates(update).any() and not to_vector(update).any()


def test_a_parameter_without_gradient_still_moves_by_the_correction() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="scaffold"))
    received = {"w": torch.zeros(3), "variate/w": torch.ones(3)}
    w = torch.nn.Parameter(torch.zeros(3))
    rule = algorithm.local(received, {}, Place())
    rule.correct({"w": w})
    assert w.grad is not None and torch.equal(w.grad, torch.ones(3))


@pytest.mark.parametrize("sampled_silos", [5, 2])
def test_the_servers_variate_stays_the_mean_of_all_silos_variates(sampled_silos: int) -> None:
    """So it moves by |S|/N of the mean of all deltas; FedML's fault, the last client's delta alone, breaks it."""
    silos = quadratics(5)
    federation = Federation(silos, AlgorithmSpec(name="scaffold"))
    generator = torch.Generator().manual_seed(0)
    zero = {f"variate/{k}": torch.zeros_like(v) for k, v in to_tensors(torch.zeros(6)).items()}
    for _ in range(8):
        sampled = torch.randperm(5, generator=generator)[:sampled_silos].sort().values.tolist()
        federation.round(sampled)
        mean = torch.stack([variates(state or zero) for state in federation.silo_states]).mean(0)
        torch.testing.assert_close(variates(federation.state), mean, rtol=0, atol=1e-6)
        assert mean.abs().max() > 1e-3


def test_scaffold_reaches_the_true_optimum_where_fedavg_is_biased() -> None:
    """Five unlike quadratics, K = 10 steps: FedAvg ends 0.11 from the minimiser of the mean loss, SCAFFOLD 2e-8."""
    silos = quadratics(5, seed=4)
    for silo in silos:
        silo.weight = 1.0
    optimum = torch.linalg.solve(sum(s.A for s in silos), sum(s.A @ s.b for s in silos))
    away = {}
    for name in ("fedavg", "scaffold"):
        federation = Federation(silos, AlgorithmSpec(name=name), steps=10, rate=0.2)
        for _ in range(200):
            reached = federation.round()
        away[name] = (reached.double() - optimum).norm().item()
    assert away["fedavg"] > 0.1, away
    assert away["scaffold"] < 1e-5, away


def test_scaffold_with_a_part_of_the_silos_each_round_reaches_it_too() -> None:
    silos = quadratics(6, seed=2)
    for silo in silos:
        silo.weight = 1.0
    optimum = torch.linalg.solve(sum(s.A for s in silos), sum(s.A @ s.b for s in silos))
    federation = Federation(silos, AlgorithmSpec(name="scaffold"), steps=5, rate=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        reached = federation.round(torch.randperm(6, generator=generator)[:3].sort().values.tolist())
    assert (reached.double() - optimum).norm() < 1e-4


def test_variates_travel_in_fp32() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="scaffold"))
    theta = to_tensors(torch.zeros(6))
    sent = algorithm.broadcast(theta, algorithm.init_state(theta), 0)
    assert set(sent) == set(theta) | {f"variate/{name}" for name in theta}
    update, state, _ = train(algorithm, sent, {}, quadratics(1)[0], steps=1, optimizer=sgd(ETA))
    assert {t.dtype for t in (*sent.values(), *update.values(), *state.values())} == {torch.float32}
