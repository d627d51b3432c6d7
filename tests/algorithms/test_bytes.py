"""FedKSeed, FeedSign and Ferret at the coordinator: what a few scalars become, against closed forms over weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Algorithm, Place, Step
from fedlm.algorithms.fedkseed import STEPS, candidates
from fedlm.algorithms.feedsign import VOTES
from fedlm.messages import Tensors
from fedlm.models.directions import COORDINATES, SCALARS, add_terms, direction, move, project
from fedlm.recipe.schema import AlgorithmSpec

SEED = 3


def first() -> Tensors:
    """Nobody at the coordinator may ask for the base's weights."""
    raise AssertionError


def base() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(50, generator=generator)}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def place(silo: str, round_: int, steps: int) -> Place:
    return Place(silo, round_, 9, SEED, 0, steps)


def step(algorithm: Algorithm, theta: Tensors, updates: list[tuple[Tensors, float, Place]]) -> Tensors:
    accumulator = algorithm.accumulator(Path())
    for update, weight, where in updates:
        assert {n: t.shape for n, t in update.items()} == algorithm.expected_update(theta, where)
        assert all(t.dtype in algorithm.update_dtypes for t in update.values())
        algorithm.fold(accumulator, update, weight, where)
    theta, state = algorithm.server_step(theta, accumulator, {}, Step(updates[0][2].round, 4))
    assert state == {}
    return theta


# -------------------------------------------------------------------------------- FedKSeed


@pytest.mark.parametrize("server_lr", [None, 0.5])
def test_accumulators_are_the_weighted_mean_of_the_silos_walks(server_lr: float | None) -> None:
    """Three rounds, unequal weights and numbers of steps, 6 seeds for 9 steps so that seeds repeat: the rebuilt model
    is w + sum_i p_i (w_i - w), with each w_i walked by its silo step by step."""
    algorithm = get_algorithm(AlgorithmSpec(name="fedkseed", seeds=6, server_lr=server_lr))
    theta = algorithm.initial(first)
    expected = {n: t.double() for n, t in base().items()}
    rng = torch.Generator().manual_seed(9)
    for round_ in range(3):
        updates, means = [], {n: torch.zeros_like(t) for n, t in expected.items()}
        for silo, weight, steps in (("s0", 1.0, 9), ("s1", 5.0, 4), ("s2", 2.0, 9)):
            where = place(silo, round_, steps)
            scalars = torch.randn(steps, generator=rng) * 0.1
            updates.append(({STEPS: scalars}, weight, where))
            walked = {n: t.clone() for n, t in expected.items()}
            for k, scalar in zip(candidates(where, 6, steps).tolist(), scalars.tolist(), strict=True):
                move(walked, direction(SEED, k), -scalar)
            for n in means:
                means[n] += weight / 8.0 * (walked[n] - expected[n])
        theta = step(algorithm, theta, updates)
        for n in expected:
            expected[n] += means[n] * (server_lr or 1.0)
        rebuilt = base()
        add_terms(rebuilt, algorithm.measured(algorithm.evaluated(theta, {}), {}, place("s1", round_, 0)), SEED)
        torch.testing.assert_close(flat(rebuilt).double(), flat(expected), rtol=0, atol=2e-6)
    assert theta[SCALARS].shape == (6,) and theta[SCALARS].count_nonzero() == 6


def test_the_order_of_seeds_is_drawn_alike_at_both_ends_however_many_steps_were_taken() -> None:
    drawn = candidates(place("s0", 2, 0), 4096, 200)
    assert torch.equal(candidates(place("s0", 2, 40), 4096, 40), drawn[:40])
    assert not torch.equal(candidates(place("s1", 2, 0), 4096, 200), drawn)
    assert not torch.equal(candidates(place("s0", 1, 0), 4096, 200), drawn)
    assert drawn.min() >= 0 and drawn.max() < 4096 and len(drawn.unique()) > 180
    counts = candidates(place("s0", 0, 0), 8, 80_000).bincount(minlength=8)
    assert ((counts - 10_000).abs() < 5 * (10_000 * 7 / 8) ** 0.5).all(), "uniform over the candidates"


def test_the_update_has_as_many_scalars_as_steps_were_taken() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="fedkseed", seeds=16))
    theta = algorithm.initial(first)
    assert algorithm.expected_update(theta, place("s", 0, 7)) == {STEPS: torch.Size([7])}
    assert algorithm.expected_update(theta, place("s", 0, 0)) == {STEPS: torch.Size([0])}


# -------------------------------------------------------------------------------- FeedSign


def ballot(signs: list[int]) -> Tensors:
    return {VOTES: torch.from_numpy(np.packbits(np.array(signs) > 0))}


def test_the_majority_of_one_bit_votes_moves_everybody() -> None:
    """Three rounds of 3 steps; a tie counts as a rise; a silo that stopped after one step has one vote."""
    eta = 0.01
    algorithm = get_algorithm(AlgorithmSpec(name="feedsign", server_lr=eta))
    theta = algorithm.initial(first)
    rounds = [
        ([[1, -1, -1], [1, 1, -1], [-1, 1, 1]], [1, 1, -1]),
        ([[-1, -1, 1], [-1, 1, -1]], [-1, 1, 1]),  # two ties
        ([[-1], [-1, -1, -1], [1, 1, -1]], [-1, 1, -1]),
    ]
    elected: list[int] = []
    for round_, (votes, wanted) in enumerate(rounds):
        updates = [(ballot(v), 1.0, place(f"s{i}", round_, len(v))) for i, v in enumerate(votes)]
        assert all(u[0][VOTES].nbytes == 1 for u in updates)
        theta = step(algorithm, theta, updates)
        elected += wanted
        expected = base()
        for t, f in enumerate(elected):
            move(expected, direction(SEED, t), -eta * f)
        for description in (
            algorithm.exported(theta, {}),
            algorithm.measured(theta, {}, place("s0", round_, 0)),
            algorithm.local(theta, {}, place("s0", round_ + 1, 0)).start(),
        ):
            rebuilt = base()
            add_terms(rebuilt, description, SEED)
            torch.testing.assert_close(flat(rebuilt), flat(expected), rtol=0, atol=1e-6)
    assert theta[VOTES].nbytes == 2, "nine votes so far"


def test_a_vote_takes_one_bit() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="feedsign"))
    theta = algorithm.initial(first)
    assert algorithm.expected_update(theta, place("s", 0, 1)) == {VOTES: torch.Size([1])}
    assert algorithm.expected_update(theta, place("s", 0, 200)) == {VOTES: torch.Size([25])}
    assert algorithm.update_dtypes == (torch.uint8,)


# -------------------------------------------------------------------------------- Ferret


@pytest.mark.parametrize("per_block", [1, 4])
def test_averaged_coordinates_rebuild_the_mean_of_the_silos_reconstructions(per_block: int) -> None:
    """Three rounds, unequal weights: the rebuilt model is w + sum_i p_i Delta~_i on bases that are new every round."""
    algorithm = get_algorithm(AlgorithmSpec(name="ferret", seeds=20, per_block=per_block))
    theta = algorithm.initial(first)
    expected = {n: t.double() for n, t in base().items()}
    rng = torch.Generator().manual_seed(2)
    for round_ in range(3):
        updates = []
        for silo, weight in (("s0", 1.0), ("s1", 6.0)):
            delta = {n: torch.randn(t.shape, generator=rng) * 0.01 for n, t in base().items()}
            coordinates = project(delta, SEED, round_, 20 // per_block, per_block)
            updates.append(({COORDINATES: coordinates}, weight, place(silo, round_, 5)))
            alone = torch.zeros(round_ + 1, *coordinates.shape)
            alone[round_] = coordinates
            tilde = {n: torch.zeros_like(t) for n, t in expected.items()}
            add_terms(tilde, {COORDINATES: alone}, SEED, done=round_)
            for n in expected:
                expected[n] += weight / 7.0 * tilde[n]
        theta = step(algorithm, theta, updates)
        rebuilt = base()
        add_terms(rebuilt, algorithm.exported(theta, {}), SEED)
        torch.testing.assert_close(flat(rebuilt).double(), flat(expected), rtol=0, atol=2e-6)
    assert theta[COORDINATES].shape == (3, 20 // per_block, per_block)
    assert theta[COORDINATES].nbytes == 4 * 20 * 3
