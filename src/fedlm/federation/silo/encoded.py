"""A silo's rows as its task meets them, and its training rows in tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedlm.errors import DataError
from fedlm.recipe.privacy import by_user
from fedlm.training.encode import encode_all
from fedlm.training.stored import stored_tokens

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench
    from fedlm.training.encode import TokenSet


def task_rows(bench: Workbench, silo: str, role: str) -> tuple[Any, int]:
    """A silo's rows of a role, and how many gave none: text has become instructions where the recipe says so, once for
    all silos' rows wherever they are trained on. The model must stand on the bench.

    Raises:
        DataError: see `fedlm.federation.silo.instructions`.
    """
    if bench.recipe.data.instructions is None:
        return getattr(bench.silo_data(silo), role), 0
    from datasets import concatenate_datasets

    from fedlm.federation.silo.instructions import instructed

    found = [instructed(bench, getattr(bench.data.silo(holder), role)) for holder in bench.holders(silo)]
    return concatenate_datasets([rows for rows, _ in found]), sum(lost for _, lost in found)


def encoded(bench: Workbench, silo: str) -> TokenSet:
    """A silo's training rows that a selection by scores keeps (see `fedlm.federation.silo.selected`).

    Raises:
        DataError: the silo has no rows, none keeps a target token, or none has a score that is asked for.
    """
    rows, lost = task_rows(bench, silo, "train")
    if lost and not len(rows):
        raise DataError(
            f"none of the silo's {lost} texts became an instruction that can be used",
            where=f"silo '{silo}'",
            fix="give better examples in data.instructions.pool, or use a larger model",
        )
    recipe = bench.recipe
    length, skip = recipe.training.max_length, recipe.data.malformed == "skip"
    if bench.task.stored and not by_user(recipe):  # files of tokens do not say whose they are
        tokens = stored_tokens(rows, bench.task, bench.tokenizer, length, skip=skip)
    else:
        tokens = encode_all(rows, bench.task, bench.tokenizer, length, skip=skip, silo=silo)
    if lost:
        tokens = replace(tokens, dropped=tokens.dropped + lost)
    if (selection := recipe.data.selection) is not None and selection.method == "feddqc":
        from fedlm.federation.silo.selected import scored

        tokens = scored(bench, tokens, selection)
    return tokens
