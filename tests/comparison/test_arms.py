"""Equal steps and equal compute, counted."""

from __future__ import annotations

from typing import Any

import pytest

from fedlm.comparison.arms import federated_recipe, local_recipe, plan_arms
from fedlm.errors import RunError
from fedlm.recipe.schema import Recipe

ROWS = {"a": 100, "b": 300, "c": 0}


def recipe(training: dict[str, Any] | None = None, **federation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"source": "nowhere"},
            "data": {
                "sources": [{"path": "x.jsonl", "columns": {"text": "t"}}],
                "partition": {"kind": "iid", "silos": 3},
            },
            "task": "pretrain",
            "training": training or {"steps": 5},
            "federation": {"rounds": 4, **federation},
        }
    )


def rounds(planned: list[Any]) -> dict[str, int]:
    return {arm.name: arm.rounds for arm in planned}


def test_by_steps() -> None:
    assert rounds(plan_arms(recipe(), ROWS)) == {
        "centralised": 8,
        "alone-compute:a": 8,
        "alone-compute:b": 8,
        "alone:a": 4,
        "alone:b": 4,
    }


def test_by_epochs_compute_is_counted_in_examples() -> None:
    planned = rounds(plan_arms(recipe({"epochs": 1.0}), ROWS))
    assert planned["centralised"] == planned["alone:a"] == 4
    assert planned["alone-compute:a"] == 16
    assert planned["alone-compute:b"] == round(4 * 400 / 300)


def test_sampling_shortens_what_a_silo_does_alone() -> None:
    planned = rounds(plan_arms(recipe(sample=1, rounds=6), ROWS))
    assert planned["alone:a"] == 3
    assert planned["alone-compute:a"] == planned["centralised"] == 6


def test_only_the_budgets_and_silos_asked_for() -> None:
    assert set(rounds(plan_arms(recipe(), ROWS, budgets=["steps"], silos=["b"]))) == {"centralised", "alone:b"}
    with pytest.raises(RunError, match="did you mean 'compute'"):
        plan_arms(recipe(), ROWS, budgets=["computes"])
    with pytest.raises(RunError, match="no silo 'd'"):
        plan_arms(recipe(), ROWS, silos=["d"])


def test_the_longest_arm_is_first() -> None:
    planned = [arm.rounds for arm in plan_arms(recipe(), ROWS)]
    assert planned == sorted(planned, reverse=True)


def test_hyper_parameters_are_equal_and_nothing_stops_early() -> None:
    given = recipe(patience=2, algorithm={"name": "scaffold"}, quorum=0.5, sample=2)
    main, local = federated_recipe(given), local_recipe(given, 7)
    assert main.federation.patience is None
    assert main == given.model_copy(update={"federation": given.federation.model_copy(update={"patience": None})})
    assert local.federation.algorithm.name == "fedavg"
    assert (local.federation.rounds, local.federation.sample, local.federation.quorum) == (7, "all", 1.0)
    assert local.training == given.training.model_copy(update={"keep_optimizer": True})
    assert (local.seed, local.adapter, local.model, local.data) == (given.seed, given.adapter, given.model, given.data)


def test_an_adapter_that_is_set_up_first_is_so_in_every_arm_beyond_equal_steps() -> None:
    """Fed-SB's round 0 trains nothing: 3 rounds of training in the federation, 2 x 3 in one place, after round 0."""
    given = recipe(algorithm={"name": "fedavg"}).model_dump()
    given["federation"]["algorithm"] = {"name": "fed-sb"}
    given["adapter"] = {"kind": "lora-sb"}
    given = Recipe.model_validate(given)
    planned = rounds(plan_arms(given, ROWS))
    assert planned == {"centralised": 7, "alone-compute:a": 7, "alone-compute:b": 7, "alone:a": 4, "alone:b": 4}
    assert local_recipe(given, 7).federation.algorithm.name == "fed-sb"
