"""What a silo's figures must be before they are added up, compared or written down: a silo may be faulty or lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedlm.errors import UpdateRefused
from fedlm.federation.records import LINE, PLANNED
from fedlm.federation.updates import largest_tokens
from fedlm.messages import Fields, Reply
from fedlm.recipe.schema import Recipe

LARGEST = 2**53
"""Counts beyond it are no whole numbers in JSON readers, and a million of them still have a finite sum."""

ROLES = ("train", "validation", "test")

COUNTS = {
    "loss": ("loss_sum", "loss_tokens"),
    "choice": ("choice_correct", "choice_correct_norm", "choice_total"),
    "generation": ("generation_correct", "generation_parsed", "generation_total"),
}
"""What each metric of a recipe counts."""


def require_numbers(silo: str, fields: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse figures that are missing, no numbers, negative, not finite or absurd.

    Raises:
        UpdateRefused: naming the silo and the figure.
    """
    for name in names:
        value = fields.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UpdateRefused(f"the reply has no number {name[:80]!r}", where=silo)
        if not 0 <= value < LARGEST:
            raise UpdateRefused(f"the reply's {name[:80]!r} is {str(value)[:40]}", where=silo)


def check_training(reply: Reply) -> None:
    """Refuse a reply to `train` whose figures cannot be written down. Raises UpdateRefused."""
    require_numbers(reply.silo, reply.fields, [*LINE, *([PLANNED] if PLANNED in reply.fields else [])])


def check_card(silo: str, fields: Fields) -> Fields:
    """The data card of a reply to `hello`: rows by role, rows by label.

    Raises:
        UpdateRefused: it is no such card.
    """
    card = fields.get("card")
    parts = [card.get("rows"), card.get("labels")] if isinstance(card, dict) else [None]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(fields.get("versions"), dict):
        raise UpdateRefused("the reply has no data card or no versions", where=silo)
    assert isinstance(card, dict)
    require_numbers(silo, card["rows"], ROLES)
    require_numbers(silo, card["labels"], card["labels"])
    return card


def check_counts(reply: Reply, recipe: Recipe, rows: int) -> None:
    """Refuse a reply to `evaluate` that counts more than the silo's `rows` of this role allow.

    Raises:
        UpdateRefused: a count is missing, or impossible.
    """
    fields = reply.fields
    wanted = [name for metric in recipe.evaluation.metrics for name in COUNTS[metric]]
    require_numbers(reply.silo, fields, ["examples", *wanted])
    bounds = {"examples": rows, "loss_tokens": rows * largest_tokens(recipe)}
    for right, total in (
        ("choice_correct", "choice_total"),
        ("choice_correct_norm", "choice_total"),
        ("generation_correct", "generation_total"),
        ("generation_parsed", "generation_total"),
    ):
        bounds |= {total: rows, right: min(rows, fields.get(total, 0))}
    for name in ("examples", *wanted):
        if name in bounds and fields[name] > bounds[name]:
            raise UpdateRefused(f"the reply's '{name}' is {fields[name]}, above {bounds[name]}", where=reply.silo)
