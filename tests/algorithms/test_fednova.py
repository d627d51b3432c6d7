"""FedNova: normalised updates, whatever the silos' steps, rates and momentum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.fednova import gradient_weight
from fedlm.recipe.schema import AlgorithmSpec, TrainingSpec
from fedlm.training.schedule import learning_rate

from .quadratic import Quadratic, quadratics, sgd, to_tensors, to_vector, train


def after(name: str, silos: list[Quadratic], steps: list[int], rate: float, rounds: int) -> Tensor:
    """The global model of silos that take different numbers of SGD steps."""
    algorithm = get_algorithm(AlgorithmSpec(name=name))
    theta = to_tensors(torch.zeros(6))
    state = algorithm.init_state(theta)
    for round_ in range(rounds):
        accumulator = algorithm.accumulator(Path())
        for silo, taken in zip(silos, steps, strict=True):
            update, _, _ = train(algorithm, theta, {}, silo, steps=taken, optimizer=sgd(rate))
            algorithm.fold(accumulator, update, silo.weight, Place())
        theta, state = algorithm.server_step(theta, accumulator, state, Step(round_, len(silos)))
    return to_vector(theta)


def test_with_equal_steps_it_is_fedavg() -> None:
    silos = quadratics(3)
    nova, avg = (after(name, silos, [4, 4, 4], 0.2, 5) for name in ("fednova", "fedavg"))
    torch.testing.assert_close(nova, avg, rtol=1e-5, atol=1e-6)


def test_one_round_is_the_formula() -> None:
    """In fp64, with weights 1, 2, 3 and 1, 4 and 10 steps."""
    silos, steps, rate = quadratics(3), [1, 4, 10], 0.1
    tau = sum(silo.weight * k for silo, k in zip(silos, steps, strict=True)) / 6
    expected = torch.zeros(6, dtype=torch.float64)
    for silo, taken in zip(silos, steps, strict=True):
        w = torch.zeros(6, dtype=torch.float64)
        for _ in range(taken):
            w = w - rate * silo.gradient(w)
        expected += tau * silo.weight / 6 * w / taken
    torch.testing.assert_close(after("fednova", silos, steps, rate, 1).double(), expected, rtol=1e-5, atol=1e-6)


def test_silos_with_few_steps_do_not_lose_their_weight() -> None:
    """The paper's point: with small rates it ends at the minimiser of sum p_i F_i, FedAvg elsewhere."""
    silos, steps = quadratics(3), [10, 2, 1]
    a = sum(s.weight * s.A for s in silos)
    best = torch.linalg.solve(a, sum(s.weight * s.A @ s.b for s in silos))
    nova, avg = (after(name, silos, steps, 0.01, 800).double() for name in ("fednova", "fedavg"))
    assert (avg - best).norm() > 0.05
    assert (nova - best).norm() < 0.1 * (avg - best).norm()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_the_weight_of_a_round_s_gradients(momentum: float, done: int) -> None:
    """With a constant gradient of 1, SGD moves by lr |a|_1, also when it is cut off in the middle of a schedule."""
    spec = TrainingSpec(
        steps=6, optimizer="sgd", momentum=momentum, schedule="cosine", warmup=0.1, lr=0.3, final_lr=0.1
    )
    place, planned = Place(round=1, rounds=4), 6
    w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=spec.lr, momentum=momentum)
    for k in range(done):
        optimizer.param_groups[0]["lr"] = learning_rate(spec, (planned + k) / (4 * planned))
        w.grad = torch.ones_like(w)
        optimizer.step()
    assert gradient_weight(spec, place, planned, range(done)) == pytest.approx(-float(w.detach()) / spec.lr, rel=1e-12)


def test_adamw_counts_its_rates() -> None:
    spec = TrainingSpec(steps=4, schedule="linear", momentum=0.0, lr=0.5)
    expected = sum(learning_rate(spec, k / 4) / 0.5 for k in range(3))
    assert gradient_weight(spec, Place(), 4, range(3)) == pytest.approx(expected, rel=1e-12)
