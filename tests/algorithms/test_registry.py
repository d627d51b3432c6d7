"""Every name a recipe may use is an algorithm of its own, and what the recipe knows of it is true."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlm.algorithms import CLASSES, get_algorithm
from fedlm.algorithms.base import Place, Step, weight_of
from fedlm.errors import RecipeError, UpdateRefused
from fedlm.recipe.methods import ALGORITHMS, KINDS
from fedlm.recipe.schema import AlgorithmSpec

from .quadratic import quadratics, sgd, to_tensors, train

THETA = to_tensors(torch.linspace(-1, 1, 6))
GENERAL = [
    name
    for name, method in ALGORITHMS.items()
    if method.adapters == KINDS and method.linear and not method.personal  # personal models need a whole round
]
"""Algorithms that exchange whatever tensors they are given; the others have tests of their own."""


def updates(name: str, silos: int = 3):
    algorithm = get_algorithm(AlgorithmSpec(name=name))
    received = algorithm.broadcast(THETA, algorithm.init_state(THETA), 0)
    return [train(algorithm, received, {}, silo, steps=2, optimizer=sgd(0.1)) for silo in quadratics(silos)]


def test_every_name_is_a_class_of_its_own() -> None:
    assert set(CLASSES) == set(ALGORITHMS)
    assert len(set(CLASSES.values())) == len(CLASSES)
    for name in ALGORITHMS:
        assert type(get_algorithm(AlgorithmSpec(name=name))).__name__.lower() == name.replace("-", "")


@pytest.mark.parametrize("typo, meant", [("fedavgg", "fedavg"), ("FedAdaGrad", "fedadagrad"), ("scafold", "scaffold")])
def test_an_unknown_name_is_an_error_with_the_nearest_one(typo: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"'{meant}'"):
        get_algorithm(AlgorithmSpec.model_construct(name=typo))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_docstring_names_the_paper_of_the_facts(name: str) -> None:
    assert ALGORITHMS[name].paper in (CLASSES[name].__doc__ or "")


def test_the_documentation_has_every_method_and_its_paper() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text().splitlines()
    for name, method in ALGORITHMS.items():
        assert any(f"`{name}`" in line and line.endswith(f"| {method.paper} |") for line in lines), name


@pytest.mark.parametrize("name", GENERAL)
def test_the_silo_keeps_state_exactly_where_the_facts_say(name: str) -> None:
    _, state, _ = updates(name)[0]
    assert bool(state) is ALGORITHMS[name].silo_state


@pytest.mark.parametrize("name", GENERAL)
def test_silos_change_whole_tensors_between_steps_exactly_where_the_facts_say(name: str) -> None:
    algorithm = get_algorithm(AlgorithmSpec(name=name))
    rule = algorithm.local(algorithm.broadcast(THETA, algorithm.init_state(THETA), 0), {}, Place())
    assert rule.between_steps is ALGORITHMS[name].between_steps


@pytest.mark.parametrize("name", GENERAL)
def test_updates_have_the_names_and_shapes_that_are_expected(name: str) -> None:
    expected = get_algorithm(AlgorithmSpec(name=name)).expected_update(THETA, Place())
    for update, _, _ in updates(name):
        assert {key: value.shape for key, value in update.items()} == expected
        assert all(value.dtype is torch.float32 for value in update.values())


@pytest.mark.parametrize("name", GENERAL)
def test_the_step_depends_on_the_weighted_sum_alone_where_the_facts_say(name: str) -> None:
    assert ALGORITHMS[name].linear
    algorithm = get_algorithm(AlgorithmSpec(name=name))
    sent = [update for update, _, _ in updates(name)]
    weights = [1.0, 1.0, 1.0] if ALGORITHMS[name].equal_weights else [1.0, 5.0, 2.0]

    each = algorithm.accumulator(Path())
    for update, weight in zip(sent, weights, strict=True):
        algorithm.fold(each, update, weight, Place())
    summed = algorithm.accumulator(Path())
    total = {k: sum(w * u[k] for w, u in zip(weights, sent, strict=True)) for k in sent[0]}
    algorithm.fold(summed, total, 1.0, Place())
    summed.weight, summed.count = sum(weights), len(sent)  # what a masked sum would carry beside it

    one, _ = algorithm.server_step(THETA, each, algorithm.init_state(THETA), Step(0, 3))
    other, _ = algorithm.server_step(THETA, summed, algorithm.init_state(THETA), Step(0, 3))
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)
        assert not torch.equal(one[key], THETA[key])


def test_weights_are_held_examples_their_target_tokens_or_equal() -> None:
    fields = {"tokens": 900, "target_tokens": 70, "examples": 16, "rows": 8, "row_targets": 50}
    assert weight_of(AlgorithmSpec(weights="tokens"), fields) == 50.0
    assert weight_of(AlgorithmSpec(weights="examples"), fields) == 8.0
    assert weight_of(AlgorithmSpec(weights="equal"), fields) == 1.0
    assert weight_of(AlgorithmSpec(), fields) == 8.0


def test_scaffold_counts_silos_equally_and_refuses_to_be_told_otherwise() -> None:
    assert weight_of(AlgorithmSpec(name="scaffold"), {"rows": 8}) == 1.0
    with pytest.raises(ValueError, match="scaffold counts every silo the same"):
        AlgorithmSpec(name="scaffold", weights="tokens")


@pytest.mark.parametrize("fields", [{}, {"rows": None}, {"rows": "8"}, {"rows": True}])
def test_a_reply_without_its_count_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UpdateRefused, match="rows"):
        weight_of(AlgorithmSpec(weights="examples"), fields)
