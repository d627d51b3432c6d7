"""FedBuff and FedAsync against their formulas in float64: rounds of late updates with unequal weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.fedbuff import FedBuff, staleness_weight
from fedlm.recipe.schema import AlgorithmSpec

from .quadratic import quadratics, sgd, to_tensors, to_vector, train

LATE = [(0, 3, 1), (2, 0, 7), (5, 5, 0), (1, 4, 2)]
"""Staleness of the three updates of each round; as many earlier models are known."""


@pytest.mark.parametrize(
    "fields, wanted",
    [
        ({"staleness": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({}, [1.0, 0.5**0.5, 0.5, 1 / 3]),  # FedBuff's 1 / sqrt(1 + tau)
        ({"staleness_a": 2.0}, [1.0, 0.25, 1 / 16, 1 / 81]),
        ({"staleness": "hinge"}, [1.0, 1.0, 1.0, 1 / 41]),
        ({"staleness": "hinge", "staleness_a": 0.5, "staleness_b": 1}, [1.0, 1.0, 1 / 2, 1 / 4.5]),
    ],
)
def test_weights_of_staleness(fields: dict[str, Any], wanted: list[float]) -> None:
    found = [staleness_weight(AlgorithmSpec(name="fedbuff", **fields), tau) for tau in (0, 1, 3, 8)]
    assert found == pytest.approx(wanted, rel=1e-12)


def models(spec: AlgorithmSpec, per_round: int) -> tuple[list[torch.Tensor], list[list[tuple[torch.Tensor, int]]]]:
    """The global models of four rounds, and each round's silo models with their staleness, as vectors."""
    algorithm = get_algorithm(spec)
    assert isinstance(algorithm, FedBuff) and spec.updates_per_step() == per_round
    generator = torch.Generator().manual_seed(1)
    history = [to_tensors(torch.randn(6, generator=generator)) for _ in range(8)]
    told: list[list[tuple[torch.Tensor, int]]] = []
    state = algorithm.init_state(history[-1])
    for late in LATE:
        theta, accumulator = history[-1], algorithm.accumulator(Path())
        told.append([])
        for weight, tau in zip((1.0, 5.0, 2.0), late[:per_round], strict=False):
            place, start = Place(staleness=tau), history[-1 - tau]
            theta_i = torch.randn(6, generator=generator)
            update = {name: value - start[name] for name, value in to_tensors(theta_i).items()}
            weight = 1.0 if spec.name == "fedasync" else weight
            algorithm.fold(accumulator, algorithm.counted(update, place, start, theta), weight, place)
            told[-1].append((theta_i, tau))
        before = to_vector(theta).clone()
        stepped, state = algorithm.server_step(theta, accumulator, state, Step(0, 3))
        assert torch.equal(to_vector(theta), before), "silos still train from this model"
        history.append(stepped)
    return [to_vector(theta).double() for theta in history], told


@pytest.mark.parametrize("staleness", ["constant", "polynomial", "hinge"])
def test_fedbuff_is_the_papers_formula(staleness: Any) -> None:
    spec = AlgorithmSpec(name="fedbuff", buffer=3, server_lr=0.7, staleness=staleness)
    found, told = models(spec, 3)
    for t, answers in enumerate(told, start=8):
        step = torch.zeros(6, dtype=torch.float64)
        for weight, (theta_i, tau) in zip((1.0, 5.0, 2.0), answers, strict=True):
            step += weight / 8.0 * staleness_weight(spec, tau) * (theta_i.double() - found[t - 1 - tau])
        torch.testing.assert_close(found[t], found[t - 1] + 0.7 * step, rtol=0, atol=2e-6)


@pytest.mark.parametrize("alpha", [None, 0.9])
def test_fedasync_is_the_papers_formula(alpha: float | None) -> None:
    spec = AlgorithmSpec(name="fedasync", server_lr=alpha)
    found, told = models(spec, 1)
    assert [tau for ((_, tau),) in told] == [0, 2, 5, 1]
    for t, ((theta_i, tau),) in enumerate(told, start=8):
        mixed = (0.6 if alpha is None else alpha) * (1.0 + tau) ** -0.5
        wanted = (1 - mixed) * found[t - 1] + mixed * theta_i.double()
        torch.testing.assert_close(found[t], wanted, rtol=0, atol=2e-6)


def test_one_silo_that_is_never_late_is_centralised_training() -> None:
    """alpha = 1, mu = 0, staleness 0: rounds of one silo continue its own descent, up to the rounding of u."""
    (silo,) = quadratics(1)
    w = torch.zeros(6)
    for _ in range(4 * 3):
        w = w - 0.2 * silo.gradient(w)
    for spec in (
        AlgorithmSpec(name="fedasync", server_lr=1.0, mu=0.0),
        AlgorithmSpec(name="fedbuff", buffer=1),
    ):
        algorithm = get_algorithm(spec)
        theta = to_tensors(torch.zeros(6))
        for _ in range(3):
            update, _, _ = train(algorithm, theta, {}, silo, steps=4, optimizer=sgd(0.2))
            accumulator = algorithm.accumulator(Path())
            algorithm.fold(accumulator, update, 1.0, Place())
            theta, _ = algorithm.server_step(theta, accumulator, {}, Step(0, 1))
        torch.testing.assert_close(to_vector(theta), w, rtol=0, atol=1e-6)


def test_the_proximal_term_of_fedasync() -> None:
    """A silo that trains to the end stops where its gradient is -mu (w - theta): (A + mu) w = A b + mu theta."""
    (silo,), mu = quadratics(1), 0.8
    theta = torch.linspace(-1, 1, 6)
    algorithm = get_algorithm(AlgorithmSpec(name="fedasync", mu=mu))
    update, _, _ = train(algorithm, to_tensors(theta), {}, silo, steps=200, optimizer=sgd(0.3))
    eye = torch.eye(6, dtype=torch.float64)
    wanted = torch.linalg.solve(silo.A + mu * eye, silo.A @ silo.b + mu * theta.double())
    torch.testing.assert_close(theta.double() + to_vector(update).double(), wanted, rtol=0, atol=1e-5)
