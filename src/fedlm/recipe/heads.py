"""Heads in a recipe: tasks that put a linear layer on top of the model, in place of the next token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedlm.recipe.data_checks import all_sources, changed
from fedlm.recipe.expressions import is_template
from fedlm.recipe.methods import ALGORITHMS, PROMPTS
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

Path = tuple[str | int, ...]


class ClassifySpec(Strict):
    """Of `task: classify`."""

    labels: list[str] | None = Field(
        None,
        description="The classes, in the order of the head's rows; default: the literal `choices` of the sources, all "
        "the same. Needed where silos bring their own text.",
    )


class RewardSpec(Strict):
    """Of `task: reward`."""

    center: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Adds center (r_chosen + r_rejected)^2 to a pair's loss, which keeps rewards around 0."
    )


def labels_of(recipe: Recipe) -> list[str]:
    """The classes that a run tells apart; empty for tasks without."""
    if TASKS[recipe.task].head != "labels":
        return []
    if recipe.classify.labels is not None:
        return recipe.classify.labels
    for _, source in all_sources(recipe.data):
        if isinstance(source.columns.choices, list):
            return source.columns.choices
    return []


def outputs_of(recipe: Recipe) -> int:
    """Numbers that the run's head gives for a text; 0 without a head."""
    return {"none": 0, "labels": len(labels_of(recipe)), "score": 1}[TASKS[recipe.task].head]


def head_problems(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """What a head cannot be combined with, and settings of heads that the task does not have."""
    task, algorithm = recipe.task, recipe.federation.algorithm
    for name, spec in (("classify", recipe.classify), ("reward", recipe.reward)):
        for field in type(spec).model_fields:
            if task != name and changed(spec, field):
                yield (name, field), f"has no effect with task '{task}'"
    if TASKS[task].head == "none":
        return
    if not ALGORITHMS[algorithm.name].heads:
        able = ", ".join(sorted(name for name, method in ALGORITHMS.items() if method.heads))
        yield (
            ("federation", "algorithm", "name"),
            f"'{algorithm.name}' is a rule for the parameters of an adapter by their kind, and task '{task}' trains a "
            f"head beside it, which is of none (methods that treat all tensors alike: {able})",
        )
    if recipe.adapter.kind in PROMPTS:
        yield ("adapter", "kind"), f"a '{recipe.adapter.kind}' prompt has no head beside it: train lora, ia3 or full"
    if algorithm.weights == "tokens":
        yield (
            ("federation", "algorithm", "weights"),
            f"task '{task}' has no target tokens: weight silos by examples, or equally",
        )
    capacity = recipe.federation.capacity
    if any(one.memory is not None for one in capacity.all):
        yield (
            ("federation", "capacity"),
            f"memory is planned for tasks that predict tokens, not for '{task}': give rank, layers, targets or steps",
        )
    if TASKS[task].head == "labels":
        yield from _labels(recipe)


def _labels(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    labels, here = labels_of(recipe), ("classify", "labels")
    for path, source in all_sources(recipe.data):
        choices = source.columns.choices
        if choices is None:
            continue  # rows of another kind are refused elsewhere
        if isinstance(choices, str) or any(is_template(choice) for choice in choices):
            yield (
                (*path, "columns", "choices"),
                "task 'classify' needs the same classes for all rows: list them literally, as in [sport, tech], or use "
                "task 'instruct' with the metric 'choice', which scores each row's own choices as text",
            )
        elif strange := [choice for choice in choices if choice not in labels]:
            yield (
                (*path, "columns", "choices"),
                f"'{strange[0]}' is none of the classes: give all sources the same, or list all in classify.labels",
            )
    if recipe.classify.labels is None and recipe.data.at_silos:
        yield here, "name the classes: the recipe does not see the silos' text"
    elif len(labels) < 2 and (labels or recipe.classify.labels is not None):
        yield here, f"there is only one class, '{labels[0]}'" if labels else "there is no class"
    elif len(set(labels)) < len(labels):
        yield here, f"'{next(label for label in labels if labels.count(label) > 1)}' is named twice"
