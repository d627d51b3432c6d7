"""What DiLoCo and its relatives cannot keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlm.recipe.data_checks import Problem
from fedlm.recipe.methods import ALGORITHMS

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe


def outer_problems(recipe: Recipe) -> Iterator[Problem]:
    """Settings with which silos could not go on from where they stand, or fragments not come in turn."""
    spec, here = recipe.federation, ("federation",)
    algorithm, method = spec.algorithm, ALGORITHMS[spec.algorithm.name]
    name = algorithm.name
    if method.goes_on:
        if not recipe.training.keep_optimizer:
            yield (
                ("training", "keep_optimizer"),
                f"must be true with '{name}': its silos go on from where they stand, and so does their optimiser",
            )
        for field in ("sample", "oversample"):
            if getattr(spec, field) not in ("all", 0.0):
                yield (
                    (*here, field),
                    f"not with '{name}': a silo that is not asked in every round falls behind the others",
                )
    if name == "eager-diloco" and spec.quorum < 1:
        yield (
            (*here, "quorum"),
            f"must be 1 with '{name}': a silo takes its own part of the last round's mean out again, so that mean has "
            "to be of all silos",
        )
    if name == "streaming-diloco":
        yield from _streaming(recipe)
    if name == "delayed-nesterov" and algorithm.momentum_share > 1 / algorithm.buffer:
        yield (
            (*here, "algorithm", "momentum_share"),
            f"is above 1 / `buffer`, {1 / algorithm.buffer:g}: the refreshing step would take momentum back",
        )


def _streaming(recipe: Recipe) -> Iterator[Problem]:
    spec, here = recipe.federation, ("federation", "algorithm")
    algorithm, steps = spec.algorithm, recipe.training.steps
    if spec.downlink.send == "full":
        yield (
            ("federation", "downlink", "send"),
            "must be 'changed' with 'streaming-diloco': otherwise the whole model travels down for every fragment",
        )
    if spec.rounds < algorithm.fragments:
        yield (
            (*here, "fragments"),
            f"{algorithm.fragments} fragments, one a round, do not fit {spec.rounds} rounds: some of the model would "
            "never be synchronised",
        )
    if steps is not None and algorithm.overlap >= steps:
        yield (
            (*here, "overlap"),
            f"{algorithm.overlap} steps into a round of {steps}: a fragment is mixed in before the next one leaves",
        )
    if algorithm.fragments == 1 and algorithm.pattern != "strided":
        yield (*here, "pattern"), "has no effect with one fragment"
