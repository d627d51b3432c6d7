"""Public rows that silos train on beside their own: a part of a recipe's `data`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from fedlm.recipe.source import SourceSpec
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.data_checks import Path, Problem
    from fedlm.recipe.schema import Recipe

HERE: Path = ("data", "augment")


class AugmentSpec(Strict):
    """Each silo trains on its own rows and on the public rows nearest to centres of its rows, which the coordinator
    chooses so that all silos' together cover the domain (FedDCA: Wang et al., Findings of EMNLP 2025)."""

    sources: list[SourceSpec] = Field(
        min_length=1, description="Public rows, as `data.sources`. Every silo reads them by itself."
    )
    rows: PositiveInt = Field(description="Public rows for each silo.")
    centres: PositiveInt = Field(1, description="Centres chosen of each silo's; its rows are shared out among them.")
    clusters: PositiveInt = Field(8, description="Groups that a silo's rows are put into (k-means), at most.")
    min_group: Annotated[int, Field(ge=2)] = Field(
        5, description="Fewest rows of a group, and so of what a centre that leaves the silo is a mean of."
    )
    dimensions: PositiveInt = Field(32, description="Numbers that describe a row, and that a centre has.")


def augment_problems(recipe: Recipe) -> Iterator[Problem]:
    """What public rows cannot be combined with, or would not read."""
    spec = recipe.data.augment
    if spec is None:
        return
    if not TASKS[recipe.task].selects:
        able = ", ".join(name for name, facts in TASKS.items() if facts.selects)
        yield HERE, f"public rows are found by instruction and response, which '{recipe.task}' rows have not ({able})"
    if recipe.adapter.kind == "full":
        yield HERE, "not with full weights: the model that the run began with, which describes rows, is trained away"
    for other in ("selection", "instructions"):
        if getattr(recipe.data, other) is not None:
            yield HERE, f"not together with data.{other}: each would have to judge the other's rows"
    if spec.centres > spec.clusters:
        yield (*HERE, "centres"), f"{spec.centres} centres cannot be chosen of {spec.clusters} clusters"
    if spec.rows < spec.centres:
        yield (*HERE, "rows"), f"{spec.rows} rows cannot be shared out among {spec.centres} centres"
    for i, source in enumerate(spec.sources):
        if source.role in ("validation", "test"):
            yield (*HERE, "sources", i, "role"), "public rows are trained on and measure nothing"
