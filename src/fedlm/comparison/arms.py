"""The arms of a comparison: who trains on what, for how long, and what is the same in all of them.

| arm                  | trains on            | optimiser steps                                        |
|----------------------|----------------------|--------------------------------------------------------|
| base                 | nothing              | 0                                                      |
| federated            | all silos, by rounds | the recipe's                                           |
| alone:SILO           | one silo's rows      | as many as a silo takes in the federation              |
| alone-compute:SILO   | one silo's rows      | as many as all silos of the federation take together   |
| centralised          | all rows in one place| as many as all silos of the federation take together   |

Batch size, learning rate, schedule (over the arm's own length), adapter and initial values are equal. The arms that
train in one place do so without interruption: the optimiser's moments are kept between rounds, as without a federation;
and they train the whole adapter, whatever `federation.capacity` says of silos.
Every arm is measured as it is after its last step: nothing is chosen by looking at held-out text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlm.errors import RunError, nearest
from fedlm.federation.sampling import updates_per_round
from fedlm.federation.silo.workbench import POOLED
from fedlm.recipe.capacity import CapacitySpec
from fedlm.recipe.guards import DownlinkSpec
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AlgorithmSpec, Recipe

BASE, FEDERATED, ALONE, ALONE_COMPUTE, CENTRALISED = "base", "federated", "alone", "alone-compute", "centralised"
BUDGETS = ("steps", "compute")


@dataclass(frozen=True)
class Arm:
    """One training to compare; `silos` is None for all of them."""

    kind: str
    silo: str | None
    rounds: int

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.silo}" if self.kind in (ALONE, ALONE_COMPUTE) else self.kind

    @property
    def folder(self) -> str:
        """Name of the arm's folder."""
        return self.name.replace(":", ".")


def plan_arms(
    recipe: Recipe,
    rows: Mapping[str, int],
    *,
    budgets: Sequence[str] = BUDGETS,
    silos: Sequence[str] | None = None,
) -> list[Arm]:
    """The arms that train in one place, the longest first so that workers end together.

    Args:
        rows: training rows by silo. Silos without rows train no arm of their own.
        budgets: 'steps' for silos alone at equal steps, 'compute' for silos alone at equal total compute.
        silos: the silos that train alone; all by default.

    Raises:
        RunError: an unknown budget or silo.
    """
    for budget in budgets:
        if budget not in BUDGETS:
            raise RunError(f"unknown budget '{budget}'", where="budgets", fix=nearest(budget, BUDGETS))
    for silo in silos or ():
        if silo not in rows:
            raise RunError(f"there is no silo '{silo}'", fix=nearest(silo, rows))
    rows = {name: rows[name] for name in sorted(rows) if rows[name] > 0}
    chosen = [name for name in rows if silos is None or name in silos]
    arms = [Arm(CENTRALISED, POOLED, pooled_rounds(recipe, len(rows)))]
    if "compute" in budgets:
        arms += [Arm(ALONE_COMPUTE, s, compute_rounds(recipe, rows, s)) for s in chosen]
    if "steps" in budgets:
        arms += [Arm(ALONE, s, alone_rounds(recipe, len(rows))) for s in chosen]
    return sorted(arms, key=lambda arm: (-arm.rounds, arm.name))


def alone_rounds(recipe: Recipe, silos: int) -> int:
    """Rounds that a silo takes part in, on average."""
    setup = setup_rounds(recipe)
    return setup + max(
        1, round((recipe.federation.rounds - setup) * updates_per_round(recipe.federation, silos) / silos)
    )


def compute_rounds(recipe: Recipe, rows: Mapping[str, int], silo: str) -> int:
    """Rounds of one silo that make as many optimiser steps (or examples) as all silos in all rounds."""
    share = updates_per_round(recipe.federation, len(rows)) / len(rows)
    per_round = len(rows) if recipe.training.steps is not None else sum(rows.values()) / rows[silo]
    setup = setup_rounds(recipe)
    return setup + max(1, round((recipe.federation.rounds - setup) * share * per_round))


def pooled_rounds(recipe: Recipe, silos: int) -> int:
    """Rounds over the pooled rows that make as many steps (or examples) as all silos in all rounds."""
    if recipe.training.steps is None:  # an epoch of the pooled rows is an epoch of every silo
        return alone_rounds(recipe, silos)
    setup = setup_rounds(recipe)
    return setup + max(1, (recipe.federation.rounds - setup) * updates_per_round(recipe.federation, silos))


def setup_rounds(recipe: Recipe) -> int:
    """Rounds at the start of a run that train nothing; an arm that trains in one place has them too."""
    return ALGORITHMS[recipe.federation.algorithm.name].setup_rounds


def federated_recipe(recipe: Recipe) -> Recipe:
    """The recipe as it is, without early stopping: all arms run their whole length."""
    return recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"patience": None})})


def local_recipe(recipe: Recipe, rounds: int = 1) -> Recipe:
    """Training in one place: one participant over `rounds` rounds, its optimiser never restarted.

    It is FedAvg, unless the adapter has to be set up first: then the federation's own algorithm.
    """
    federation = recipe.federation.model_copy(
        update={
            "rounds": rounds,
            "algorithm": recipe.federation.algorithm if setup_rounds(recipe) else AlgorithmSpec(),
            "sample": "all",
            "oversample": 0.0,
            "quorum": 1.0,
            "deadline": None,
            "patience": None,
            "keep": "best-and-last",
            "downlink": DownlinkSpec(),
            "capacity": CapacitySpec(),
        }
    )
    return recipe.model_copy(
        update={
            "federation": federation,
            "guards": [],
            "training": recipe.training.model_copy(update={"keep_optimizer": True}),
            "evaluation": recipe.evaluation.model_copy(update={"every": rounds}),
            "trackers": [],
        }
    )
