"""Rules against bad silos in a recipe: how many silos they need, and what cannot be compared as products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlm.errors import nearest
from fedlm.recipe.data_checks import Problem, changed
from fedlm.recipe.methods import ALGORITHMS

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

HERE = ("federation", "algorithm")

TURNED = "the rule puts products back into factors of another basis in every round"
"""Why nothing of a round's factors can be kept for the next one, with `robust_on: product`."""


def robust_problems(recipe: Recipe) -> Iterator[Problem]:
    """What a rule against bad silos cannot keep."""
    spec = recipe.federation.algorithm
    yield from _numbers(recipe)
    if spec.robust_on == "product" and "robust_on" in ALGORITHMS[spec.name].options:
        yield from _products(recipe)
    elif "robust_on" in ALGORITHMS[spec.name].options and spec.recompress is not None:
        yield (*HERE, "recompress"), "has no effect without `robust_on: product`: nothing is merged"
    if spec.name == "fltrust":
        yield from _root(recipe)


def updates_per_round(recipe: Recipe) -> int | None:
    """The most updates that a round's step can be made of; None where the recipe does not say it."""
    data, sample = recipe.data, recipe.federation.sample
    silos = len(data.silos) or (data.partition.silos if data.partition else None)
    if isinstance(sample, int):
        return sample if silos is None else min(sample, silos)
    if silos is None or sample == "all":
        return silos
    return max(1, round(sample * silos))


def _numbers(recipe: Recipe) -> Iterator[Problem]:
    spec, updates = recipe.federation.algorithm, updates_per_round(recipe)
    method = ALGORITHMS[spec.name]
    groups = spec.groups if "groups" in method.options else None
    if groups is not None and updates is not None and groups > updates:
        yield (*HERE, "groups"), f"{groups} groups cannot be made of a round's {updates} silos"
        return
    seen = updates if groups is None else groups
    if method.withstands is not None and seen is not None and seen < spec.updates_needed():
        what = f"a round has {seen}" if groups is None else f"there are {seen} groups"
        needed = f"'{spec.name}' withstands {spec.byzantine} bad ones among at least {spec.updates_needed()}"
        yield (*HERE, "byzantine"), f"{needed}, and {what}"
        return
    if spec.selected is not None and seen is not None and spec.name == "multi-krum":
        most = seen - spec.byzantine - 2
        if spec.selected > most:
            yield (
                (*HERE, "selected"),
                f"of {seen} with {spec.byzantine} bad ones at most {most} can be averaged: n - f - 2",
            )


def _products(recipe: Recipe) -> Iterator[Problem]:
    """What only updates that are compared as they travel can have."""
    spec, here = recipe.federation.algorithm, (*HERE, "robust_on")
    name, method = spec.name, ALGORITHMS[spec.name]
    if method.no_product:
        yield here, f"'product' not with '{name}': {method.no_product}"
        return
    if recipe.adapter.kind != "lora":
        yield here, f"'product' is of LoRA's factors, and adapter.kind is '{recipe.adapter.kind}'"
    if spec.groups is not None and "groups" in method.options:
        yield (
            (*HERE, "groups"),
            "not with `robust_on: product`: a sum of factors has not the sum of their products",
        )
    if name == "flame" and spec.noise != 0:
        yield (*HERE, "noise"), "must be 0 with `robust_on: product`: noise on a product is a dense matrix"
    if recipe.training.keep_optimizer:
        yield ("training", "keep_optimizer"), f"not with `robust_on: product`: {TURNED}"
    if recipe.guards and recipe.guards[0].error_feedback:
        yield ("guards", 0, "error_feedback"), f"not with `robust_on: product`: {TURNED}"
    if recipe.federation.downlink.guards:
        yield (
            ("federation", "downlink", "guards"),
            "not with `robust_on: product`: what is merged beside the frozen weights is not rounded",
        )


def _root(recipe: Recipe) -> Iterator[Problem]:
    """FLTrust's trusted silo takes part in every round."""
    root, names = recipe.federation.algorithm.root, [silo.name for silo in recipe.data.silos]
    if root is None:
        yield (*HERE, "root"), "name the silo that the coordinator trusts: 'fltrust' measures all others by it"
        return
    if names and root not in names:
        yield (*HERE, "root"), f"there is no silo '{root}': {nearest(root, names)}"
    for field in ("sample", "oversample"):
        if changed(recipe.federation, field):
            yield (
                ("federation", field),
                f"not with 'fltrust': the trusted silo '{root}' has to take part in every round",
            )
