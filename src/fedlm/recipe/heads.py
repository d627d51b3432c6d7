"""Heads in a recipe: tasks that put a linear layer, or a predictor, on top of the model in place of the next token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from fedlm.recipe.data_checks import all_sources, changed
from fedlm.recipe.expressions import is_template
from fedlm.recipe.methods import ALGORITHMS, PROMPTS
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

Path = tuple[str | int, ...]


class ClassifySpec(Strict):
    """Of `task: classify` and `task: label-words`."""

    labels: list[str] | None = Field(
        None,
        description="The classes, in the order of the head's rows; their names are the label words. Default: the "
        "literal `choices` of the sources, all the same. Needed where silos bring their own text.",
    )


class RewardSpec(Strict):
    """Of `task: reward`."""

    center: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Adds center (r_chosen + r_rejected)^2 to a pair's loss, which keeps rewards around 0."
    )


class GroupPreferenceSpec(Strict):
    """Of `task: group-preference`."""

    context: PositiveInt = Field(
        8,
        description="Rows of a group from which its other rows are predicted: so many where they are measured, and "
        "drawn from 1 to so many for each step of training.",
    )


def labels_of(recipe: Recipe) -> list[str]:
    """The classes that a run tells apart; empty for tasks without."""
    if not TASKS[recipe.task].classes:
        return []
    if recipe.classify.labels is not None:
        return recipe.classify.labels
    for _, source in all_sources(recipe.data):
        if isinstance(source.columns.choices, list):
            return source.columns.choices
    return []


def outputs_of(recipe: Recipe) -> int:
    """Numbers that the run's linear head gives for a text; 0 without one."""
    return {"none": 0, "labels": len(labels_of(recipe)), "score": 1, "predictor": 0}[TASKS[recipe.task].head]


def head_problems(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """What a head cannot be combined with, and settings of heads that the task does not have."""
    task, algorithm = recipe.task, recipe.federation.algorithm
    for name in ("classify", "reward", "group_preference"):
        spec, its = getattr(recipe, name), task == name.replace("_", "-")
        for field in type(spec).model_fields:
            if not its and not (name == "classify" and TASKS[task].classes) and changed(spec, field):
                yield (name, field), f"has no effect with task '{task}'"
    yield from _predictor(recipe)
    if TASKS[task].classes:
        yield from _labels(recipe)
    if TASKS[task].head == "none":
        return
    if not ALGORITHMS[algorithm.name].heads:
        able = ", ".join(sorted(name for name, method in ALGORITHMS.items() if method.heads))
        yield (
            ("federation", "algorithm", "name"),
            f"'{algorithm.name}' is a rule for the parameters of an adapter by their kind, and task '{task}' trains a "
            f"head beside it, which is of none (methods that treat all tensors alike: {able})",
        )
    if recipe.adapter.kind in PROMPTS and TASKS[task].head != "predictor":
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


def _predictor(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """The adapter 'predictor' belongs to its task, and the task to it."""
    task, adapter, training = recipe.task, recipe.adapter, recipe.training
    if (adapter.kind == "predictor") != (TASKS[task].head == "predictor"):
        able = ", ".join(name for name, facts in TASKS.items() if facts.head == "predictor")
        yield (
            ("adapter", "kind"),
            f"task '{task}' trains a predictor on the frozen model: set it to predictor"
            if adapter.kind != "predictor"
            else f"a predictor gives preferences and no text, which is no use to task '{task}' (it belongs to {able})",
        )
    if adapter.kind != "predictor":
        return
    if adapter.width % adapter.heads:
        yield ("adapter", "heads"), f"{adapter.heads} heads cannot share a width of {adapter.width}"
    for field in ("compile", "gradient_checkpointing"):
        if changed(training, field):
            yield ("training", field), "has no effect: the language model is frozen, and read once"
    if training.batch_size <= recipe.group_preference.context:
        yield (
            ("training", "batch_size"),
            f"a step's {training.batch_size} rows hold its context and what is predicted from it: take more than "
            f"group_preference.context ({recipe.group_preference.context})",
        )
    most = recipe.evaluation.max_examples
    if most is not None and most <= recipe.group_preference.context:
        yield (
            ("evaluation", "max_examples"),
            f"a row is predicted from {recipe.group_preference.context} others (group_preference.context): take more",
        )


def _labels(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    labels, here = labels_of(recipe), ("classify", "labels")
    for path, source in all_sources(recipe.data):
        choices = source.columns.choices
        if choices is None:
            continue  # rows of another kind are refused elsewhere
        if isinstance(choices, str) or any(is_template(choice) for choice in choices):
            yield (
                (*path, "columns", "choices"),
                f"task '{recipe.task}' needs the same classes for all rows: list them literally, as in [sport, tech], "
                "or use task 'instruct' with the metric 'choice', which scores each row's own choices as text",
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
