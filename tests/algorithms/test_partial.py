"""Silos that trained a part of the model: a tensor's mean is over those that trained it, and the others' stay."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Accumulator, Algorithm, Place, Step
from fedlm.messages import Tensors
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AlgorithmSpec

WEIGHTS = {"one": 3.0, "two": 1.0, "three": 2.0}
BY_COORDINATE = [
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "scaffold",
    "feddyn",
    "task-arithmetic",
]
"""Rules whose step of a coordinate depends on that coordinate alone."""


def update(silo: str, names: str, round_: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(100 * round_ + sum(map(ord, silo)))
    drawn = {name: torch.randn(3, 4, generator=generator) for name in "abc"}
    return {name: drawn[name] for name in names}


def test_the_mean_of_a_tensor_is_over_the_silos_that_trained_it() -> None:
    parts = {"one": "ab", "two": "bc", "three": "b"}
    for order in itertools.permutations(parts):
        accumulator = Accumulator()
        for silo in order:
            accumulator.add(update(silo, parts[silo]), WEIGHTS[silo])
        mean = dict(accumulator.mean())
        assert mean.keys() == set("abc") and accumulator.count == 3
        assert [accumulator.counted(name) for name in "abcd"] == [1, 3, 1, 0]
        torch.testing.assert_close(mean["a"], update("one", "a")["a"], rtol=1e-6, atol=0)
        torch.testing.assert_close(mean["c"], update("two", "c")["c"], rtol=1e-6, atol=0)
        expected = sum(WEIGHTS[silo] * update(silo, "b")["b"].double() for silo in parts) / 6
        torch.testing.assert_close(mean["b"], expected.float(), rtol=1e-6, atol=1e-7)


def test_a_tensor_that_all_trained_has_the_same_bits_beside_others_that_not_all_did() -> None:
    whole, part = Accumulator(), Accumulator()
    for silo, names in (("one", "ab"), ("two", "b"), ("three", "cb")):
        whole.add(update(silo, "b"), WEIGHTS[silo])
        part.add(update(silo, names), WEIGHTS[silo])
    assert torch.equal(dict(whole.mean())["b"], dict(part.mean())["b"])


def trajectory(algorithm: Algorithm, parts: dict[str, str], names: str) -> Tensors:
    """The model after three rounds of three enrolled silos, of which those in `parts` take part."""
    theta = {name: torch.linspace(-1, 1, 12).view(3, 4) for name in names}
    state = algorithm.init_state(theta)
    for round_ in range(3):
        accumulator = algorithm.accumulator(Path())
        for silo, trained in parts.items():
            sent = update(silo, trained, round_)
            if algorithm.spec.name == "scaffold":
                sent |= {f"variate/{name}": value / 7 for name, value in sent.items()}
            algorithm.fold(accumulator, sent, WEIGHTS[silo], Place(silo=silo))
        theta, state = algorithm.server_step(theta, accumulator, state, Step(round_, 3))
    return theta


@pytest.mark.parametrize("name", BY_COORDINATE)
def test_each_tensor_moves_as_in_a_federation_of_the_silos_that_train_it(name: str) -> None:
    """'a' is trained by one silo, 'b' by all, 'c' by nobody."""
    assert ALGORITHMS[name].partial
    algorithm = get_algorithm(AlgorithmSpec(name=name))
    mixed = trajectory(algorithm, {"one": "ab", "two": "b", "three": "b"}, "abc")
    alone = trajectory(algorithm, {"one": "a"}, "a")
    together = trajectory(algorithm, {"one": "b", "two": "b", "three": "b"}, "b")
    torch.testing.assert_close(mixed["a"], alone["a"], rtol=1e-6, atol=1e-7)
    assert torch.equal(mixed["b"], together["b"])
    assert torch.equal(mixed["c"], torch.linspace(-1, 1, 12).view(3, 4))
    assert not torch.equal(mixed["a"], mixed["b"])
