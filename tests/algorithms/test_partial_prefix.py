"""Partial prefixes: which layers travel, what the server makes of them in closed form, and what stays in a silo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.partial_prefix import CHOSEN, chosen
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec
from tests.federation.conftest import Tiny

from .observed import federate, final

NAMES = [f"prompt_encoder.layers.{i}" for i in range(4)]
BETA = 0.5


def first() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(3, 8, generator=generator) for name in NAMES}


def test_the_layers_that_move_most_travel_and_have_momentum() -> None:
    """theta_2 = theta_0 + v_1 + v_2 with v_1 = mean u and v_2 = beta v_1 + mean u, on the chosen layers alone."""
    algorithm = get_algorithm(AlgorithmSpec(name="partial-prefix", layer_share=0.5, server_momentum=BETA))
    theta = algorithm.initial(first)
    state = algorithm.init_state(theta)
    size = {name: value.norm() for name, value in first().items()}
    moves = dict(zip(NAMES, (0.1, 0.4, 0.2, 0.3), strict=True))
    direction = {name: torch.full((3, 8), 1.0) / 24**0.5 for name in NAMES}
    for number in range(2):
        accumulator = algorithm.accumulator(Path())
        expected = algorithm.expected_update(theta, Place())
        assert set(expected) == (set(NAMES) if number == 0 else {NAMES[1], NAMES[3]})
        for weight, factor in ((1.0, 0.5), (3.0, 7 / 6)):  # their weighted mean is 1
            update = {name: direction[name] * size[name] * moves[name] * factor for name in expected}
            algorithm.fold(accumulator, update, weight, Place())
        theta, state = algorithm.server_step(theta, accumulator, state, Step(number, 2))
        assert chosen(theta) == [NAMES[1], NAMES[3]]
    for name, start in first().items():
        u = direction[name] * size[name] * moves[name]
        wanted = start + u + (BETA * u + u if name in chosen(theta) else 0)
        torch.testing.assert_close(theta[name], wanted, atol=1e-5, rtol=1e-5)


def test_silos_keep_the_other_layers(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(
        "adapter={kind: prefix, virtual_tokens: 8}",
        "federation.algorithm={name: partial-prefix, layer_share: 0.5}",
        "federation.rounds=3",
        "training.lr=0.1",
    )
    engine, directory = federate(recipe, tiny.base, tmp_path / "run")
    losses = [line["validation"]["loss"] for line in directory.rounds()]
    assert losses[-1] < losses[0] - 0.05
    assert all(len(update) == 2 for update in engine.updates[0].values())
    end = final(directory)
    (shared,) = chosen(end)
    (own,) = {name for name in end if name != CHOSEN} - {shared}
    assert all(set(update) == {shared} for update in engine.updates[2].values()), "half the bytes go up"
    assert torch.equal(engine.tensors[0][own], end[own]), "the global one stays as round 0 left it"
    assert not torch.equal(engine.tensors[0][shared], end[shared])
    sums = [sum(t.numel() for t in update.values()) for update in engine.updates[2].values()]
    assert sums == [8 * 2 * 2 * 16] * len(sums)


@pytest.mark.parametrize("share, count", [(0.01, 1), (0.5, 2), (0.6, 3), (0.99, 4)])
def test_at_least_one_layer_travels(share: float, count: int) -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="partial-prefix", layer_share=share))
    assert int(algorithm.best([0.3, 0.1, 0.3, 0.2]).sum()) == count  # type: ignore[attr-defined]
    assert bool(algorithm.best([0.3, 0.1, 0.3, 0.2])[0])  # type: ignore[attr-defined]


def test_a_silo_is_measured_with_its_own_layers() -> None:
    algorithm = get_algorithm(AlgorithmSpec(name="partial-prefix"))
    own = {NAMES[2]: torch.zeros(3, 8)}
    measured = algorithm.measured(first(), own, Place("a"))
    assert measured[NAMES[2]] is own[NAMES[2]]
    assert torch.equal(measured[NAMES[0]], first()[NAMES[0]])
