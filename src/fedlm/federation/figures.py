"""What a silo's figures must be before they are added up, compared or written down: a silo may be faulty or lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fedlm.errors import UpdateRefused
from fedlm.federation.records import LEFT_OUT, LINE, PLANNED, RATES
from fedlm.federation.updates import largest_tokens
from fedlm.messages import Fields, Reply
from fedlm.recipe.privacy import withheld
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS, WRITTEN, figure_of

LARGEST = 2**53
"""Counts beyond it are no whole numbers in JSON readers, and a million of them still have a finite sum."""

ROLES = ("train", "validation", "test")

COUNTS = {
    "loss": ("loss_sum", "loss_tokens"),
    "choice": ("choice_correct", "choice_correct_norm", "choice_total"),
    "generation": ("generation_correct", "generation_parsed", "generation_total"),
}
"""What each metric of a recipe counts; those of `WRITTEN` count figures."""


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


def check_training(reply: Reply, recipe: Recipe) -> None:
    """Refuse a reply to `train` whose figures cannot be written down. Raises UpdateRefused."""
    if withheld(recipe):
        require_numbers(reply.silo, reply.fields, ["steps"])
        return
    check_figures(reply.silo, reply.fields.get("figures"), LARGEST)
    given = [name for name in (*RATES, LEFT_OUT, PLANNED) if name in reply.fields]
    fields = {**reply.fields}
    loss: Any = fields.get("loss")
    if is_number(loss):
        fields["loss"] = abs(loss)  # a policy gradient's is negative as often as not
    require_numbers(reply.silo, fields, [*LINE, *given])


def check_figures(silo: str, figures: Any, most: float) -> None:
    """Refuse figures that are no (sum, count) of known names, or that count more than `most`. Raises UpdateRefused."""
    if not isinstance(figures, dict):
        raise UpdateRefused("the reply has no figures", where=silo)
    for name, pair in figures.items():
        if (known := figure_of(name)) is None:
            raise UpdateRefused(f"the reply has an unknown figure {name[:80]!r}", where=silo)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UpdateRefused(f"the reply's figure '{name}' is no sum and count", where=silo)
        total, count = pair
        require_numbers(silo, {f"{name} (sum)": abs(total) if is_number(total) else total}, [f"{name} (sum)"])
        require_numbers(silo, {f"{name} (count)": count}, [f"{name} (count)"])
        if count > most:
            raise UpdateRefused(f"the reply's '{name}' counts {count}, above {most}", where=silo)
        if (known.proportion or known.unit) and not 0 <= total <= count:
            raise UpdateRefused(f"the reply's '{name}' is {total} of {count}", where=silo)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


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
    if "users" in card:
        require_numbers(silo, card, ["users"])
    return card


def check_counts(reply: Reply, recipe: Recipe, rows: int) -> None:
    """Refuse a reply to `evaluate` that counts more than the silo's `rows` of this role allow.

    Raises:
        UpdateRefused: a count is missing, or impossible.
    """
    fields, facts = reply.fields, TASKS[recipe.task]
    check_figures(reply.silo, fields.get("figures"), rows * largest_tokens(recipe))
    if not facts.likelihood:
        require_numbers(reply.silo, fields, ["examples"])
        if absent := sorted({"loss", *facts.figures} - fields["figures"].keys()):
            raise UpdateRefused(f"the reply has no figure '{absent[0]}'", where=reply.silo)
        if fields["examples"] > rows:
            raise UpdateRefused(f"the reply's 'examples' is {fields['examples']}, above {rows}", where=reply.silo)
        return
    written = [name for metric in recipe.evaluation.metrics for name in WRITTEN.get(metric, ())]
    check_figures(reply.silo, {name: fields["figures"].get(name) for name in written}, rows)
    wanted = [name for metric in recipe.evaluation.metrics for name in COUNTS.get(metric, ())]
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
