"""Which of its rows a silo trains on, and in which order: a part of a recipe's `data`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from fedlm.recipe.data_checks import changed
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.data_checks import Path, Problem
    from fedlm.recipe.schema import Recipe

HERE: Path = ("data", "selection")

OPTIONS = {
    "feddqc": ("keep", "threshold", "stages"),
    "fedhds": ("min_group", "dimensions"),
}
"""What each method reads."""


class SelectionSpec(Strict):
    """Which of a silo's training rows are trained on, judged in the silo by the model that the run begins with."""

    method: Literal["feddqc", "fedhds"] = Field(
        description="'feddqc': by how much the instruction helps to predict the response (Du et al., ACL 2025); "
        "'fedhds': one row for each group of like rows over all silos (Qin et al., 2024)."
    )
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0, description="feddqc: share of a silo's rows, those with the highest scores."
    )
    threshold: float | None = Field(
        None, description="feddqc: keep rows with at least this score, in nats per token of the response."
    )
    stages: PositiveInt = Field(
        1, description="feddqc: the rounds go through this many equal parts of the kept rows, from high to low scores."
    )
    min_group: Annotated[int, Field(ge=2)] = Field(
        5, description="fedhds: fewest rows of a group, and so of what a centroid that leaves the silo is a mean of."
    )
    dimensions: PositiveInt = Field(8, description="fedhds: numbers that describe a row, and that a centroid has.")


def selection_problems(recipe: Recipe) -> Iterator[Problem]:
    """What a selection cannot be combined with, or would not read."""
    spec = recipe.data.selection
    if spec is None:
        return
    for method, fields in OPTIONS.items():
        for field in fields:
            if method != spec.method and changed(spec, field):
                yield (*HERE, field), f"has no effect with '{spec.method}' (it belongs to {method})"
    if not TASKS[recipe.task].selects:
        able = ", ".join(name for name, facts in TASKS.items() if facts.selects)
        yield HERE, f"rows are judged by instruction and response, which '{recipe.task}' rows have not (only {able})"
    if recipe.adapter.kind == "full":
        yield HERE, "not with full weights: the model that the run began with, which judges the rows, is trained away"
    if spec.method == "feddqc" and spec.keep == 1 and spec.threshold is None and spec.stages == 1:
        yield HERE, "has no effect: set `keep`, `threshold` or `stages`"
    if spec.stages > recipe.federation.rounds:
        yield (*HERE, "stages"), f"{spec.stages} stages do not fit into {recipe.federation.rounds} rounds"
