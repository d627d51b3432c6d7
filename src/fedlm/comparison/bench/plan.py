"""From a row to the recipes of its trainings: the same work for every method, the same tuning budget.

What differs between rows is the method, the kind of adapter that it trains, and what `rows` says. What differs between
the trainings of a row is the learning rate and the seed. Split and partition keep the recipe's own seed, so that all
trainings have the same silos; the seed of a training decides first values, batches and sampling.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlm.comparison.bench.rows import Row
from fedlm.federation.sampling import wanted
from fedlm.recipe.load import load_recipe, recipe_hash
from fedlm.recipe.methods import FACTORS
from fedlm.recipe.schema import AlgorithmSpec, Recipe, TrainingSpec

TUNING, REPORTING = "validation", "test"
"""Rows that the two kinds of training are measured on."""


@dataclass(frozen=True)
class Base:
    """The work that all rows do."""

    file: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    silos: int
    first: str = "silo-0"
    """The name of the first silo, which the others are measured by where a method trusts one."""


@dataclass(frozen=True)
class Job:
    """One training: a row with a learning rate and a seed."""

    row: Row
    lr: float
    seed: int
    role: str
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.row.name} lr {self.lr:.3g} seed {self.seed}" + (" (tuning)" if self.role == TUNING else "")

    @property
    def name(self) -> str:
        """Of its files; another recipe is another job."""
        digest = hashlib.sha256(f"{self.role} {recipe_hash(self.recipe)}".encode()).hexdigest()
        return f"{self.row.name}-{digest[:16]}"


def rates(base: Base, row: Row, count: int) -> list[float]:
    """The rates that are tried: around the row's own middle, each `row.spacing` times the one before.

    One, which nothing reads, for a method without a rate.
    """
    if "lr" in row.facts.without and row.server_lr is None:
        count = 1
    middle = row.lr * base.recipe.training.lr if row.server_lr is None else row.server_lr
    found = [middle * row.spacing ** (i - (count - 1) / 2) for i in range(count)]
    return [float(f"{rate:.3g}") for rate in found]


def job(base: Base, row: Row, lr: float, seed: int, role: str) -> Job:
    """Raises:
    RecipeError: the recipe and the row exclude each other, with the reason.
    """
    return Job(row, lr, seed, role, load_recipe(base.file, [*base.overrides, *changes(base, row, lr, seed, role)]))


def changes(base: Base, row: Row, lr: float, seed: int, role: str) -> list[str]:
    """What `--set` would make of the base recipe for this training."""
    recipe, facts = base.recipe, row.facts
    weights = recipe.federation.algorithm.weights
    algorithm = row.method if weights is None or facts.equal_weights else f"{row.method}, weights: {weights}"
    found = [f"federation.algorithm={{name: {algorithm}}}", *_adapter(base, row)]
    found += [*_ranks(base, row), *_training(recipe.training, row), *_bad_silos(base, row)]
    found += [f"federation.rounds={_rounds(base, row)}", *row.change]
    if row.server_lr is not None:
        found.append(f"federation.algorithm.server_lr={lr!r}")
    if "lr" not in row.facts.without:
        found.append(f"training.lr={lr if row.server_lr is None else float(f'{row.lr * recipe.training.lr:.3g}')!r}")
    data_seed = recipe.seed if recipe.data.seed is None else recipe.data.seed
    found += [f"seed={seed}", f"data.seed={data_seed}", "federation.patience=null", "federation.workers=1"]
    found += ["federation.keep=best-and-last", "trackers=[]"]
    if role == TUNING:  # one look at the end decides
        found.append(f"evaluation.every={2**31 - 1}")
    else:  # once in as many trainings as the recipe's round has
        found.append(f"evaluation.every={_steps_per_round(base, row)}")
    return found


def _steps_per_round(base: Base, row: Row) -> int:
    """Server steps that take as many updates as a round of the recipe."""
    return max(1, wanted(base.recipe.federation, base.silos) // row.buffer) if row.facts.asynchronous else 1


def _adapter(base: Base, row: Row) -> list[str]:
    kinds = row.facts.adapters
    if base.recipe.adapter.kind in kinds:
        return []
    if kinds[0] == "full":
        return ["adapter={kind: full}", *(["model.dtype=float32"] if row.facts.zeroth_order else [])]
    if kinds[0] not in FACTORS:
        return [f"adapter={{kind: {kinds[0]}}}"]
    return [f"adapter.kind={kinds[0]}"]


def _ranks(base: Base, row: Row) -> list[str]:
    adapter, found = base.recipe.adapter, []
    rank = max(1, round(row.rank * adapter.rank))
    if rank != adapter.rank:
        found += [f"adapter.rank={rank}", f"adapter.alpha={adapter.alpha * rank / adapter.rank}"]
    if row.ranks:
        dealt = ", ".join(f"{{rank: {max(1, round(share * rank))}}}" for share in row.ranks)
        found.append(f"federation.capacity={{dealt: [{dealt}]}}")
    return found


def _bad_silos(base: Base, row: Row) -> list[str]:
    """As many bad silos as the default, or as the recipe's silos are enough for; and a trusted one."""
    found = []
    if row.facts.withstands is not None:
        times, more = row.facts.withstands
        most = max(0, (wanted(base.recipe.federation, base.silos) - more) // times)
        found.append(f"federation.algorithm.byzantine={min(most, AlgorithmSpec().byzantine)}")
    if "root" in row.facts.options:
        found.append(f"federation.algorithm.root={json.dumps(base.first)}")
    return found


def _training(spec: TrainingSpec, row: Row) -> list[str]:
    """Settings that the method never reads go back to their defaults; steps are multiplied."""
    fields = TrainingSpec.model_fields
    found = [
        f"training.{name}={_written(fields[name].get_default(call_default_factory=True))}"
        for name in row.facts.without
        if name != "lr" or spec.lr != fields["lr"].default
    ]
    if row.steps > 1:
        length = "steps" if spec.steps is not None else "epochs"
        found.append(f"training.{length}={row.steps * getattr(spec, length)}")
    return found


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _rounds(base: Base, row: Row) -> int:
    """As many local trainings as in the recipe: set-up rounds come on top, and server steps of another number of
    updates are more or fewer."""
    federation = base.recipe.federation
    if not row.facts.asynchronous:
        return federation.rounds + row.facts.setup_rounds
    trainings = federation.rounds * wanted(federation, base.silos)
    return max(1, trainings // row.buffer)


def jobs_of(base: Base, row: Row, lrs: Sequence[float], seeds: Sequence[int], role: str) -> list[Job]:
    return [job(base, row, lr, seed, role) for lr in lrs for seed in seeds]
