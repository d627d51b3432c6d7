"""Tasks: what a run learns from its rows, one file each."""

from __future__ import annotations

from fedlm.errors import RecipeError, nearest
from fedlm.recipe.schema import Recipe
from fedlm.training.tasks.base import Task
from fedlm.training.tasks.classify import Classify
from fedlm.training.tasks.group_preference import GroupPreference
from fedlm.training.tasks.instruct import Instruct
from fedlm.training.tasks.label_words import LabelWords
from fedlm.training.tasks.preference import Preference
from fedlm.training.tasks.pretrain import Pretrain
from fedlm.training.tasks.reinforce import Reinforce
from fedlm.training.tasks.reward import Reward
from fedlm.training.tasks.selector import Selector

CLASSES: dict[str, type[Task]] = {
    "classify": Classify,
    "group-preference": GroupPreference,
    "instruct": Instruct,
    "label-words": LabelWords,
    "preference": Preference,
    "pretrain": Pretrain,
    "reinforce": Reinforce,
    "reward": Reward,
    "selector": Selector,
}


def get_task(name: str, recipe: Recipe | None = None) -> Task:
    """The task of this name.

    Args:
        recipe: the run's, for tasks with settings of their own.

    Raises:
        RecipeError: there is none.
    """
    if name not in CLASSES:
        raise RecipeError(f"unknown task '{name}'", fix=nearest(name, CLASSES))
    return CLASSES[name](recipe)


__all__ = ["CLASSES", "Task", "get_task"]
