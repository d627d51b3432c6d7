"""Tasks: what one example's loss means. Each turns a canonical row into token ids and a mask of target tokens."""

from __future__ import annotations

from fedlm.errors import RecipeError, nearest
from fedlm.training.tasks.base import Encoded, Task
from fedlm.training.tasks.instruct import Instruct
from fedlm.training.tasks.pretrain import Pretrain

TASKS: dict[str, type[Task]] = {"instruct": Instruct, "pretrain": Pretrain}


def get_task(name: str) -> Task:
    """The task of this name.

    Raises:
        RecipeError: there is none.
    """
    if name not in TASKS:
        raise RecipeError(f"unknown task '{name}'", fix=nearest(name, TASKS))
    return TASKS[name]()


__all__ = ["TASKS", "Encoded", "Task", "get_task"]
