"""What a silo's owner insists on so that updates and rows are protected, the section `privacy` of policy.yaml, and
whether a recipe does it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from fedlm.federation.silo.refusals import Forbidden
from fedlm.privacy.secagg.graph import MOST
from fedlm.recipe.privacy import noised_by_silos, noised_in_training, withheld
from fedlm.recipe.schema import Recipe
from fedlm.recipe.strict import Strict


class PrivacyRules(Strict):
    """What a recipe must do to protect updates and rows."""

    require_masks: bool = Field(False, description="Updates leave only under masks that cancel in the sum.")
    unit: Literal["example", "user", "silo"] | None = Field(
        None,
        description="Whose data a recipe must protect as a whole, by noise of this silo's own: each row ('example', "
        "which 'user' does as well); all rows of a person, told by a column that this silo's data file names ('user'); "
        "or this silo as one, by noise that silos add under masks ('silo').",
    )
    max_epsilon: PositiveFloat | None = Field(
        None, description="Largest epsilon of differential privacy of rows, by noise of this silo's own."
    )
    per: Literal["month", "year", "run"] = Field(
        "run", description="What `max_epsilon` and `max_token_epsilon` are for."
    )
    max_token_epsilon: PositiveFloat | None = Field(
        None,
        description="Rows are shown in context only with noise on their text, of which all different draws together "
        "cost a token at most this epsilon.",
    )


def check_privacy(rules: PrivacyRules, min_cohort: int, recipe: Recipe) -> None:
    """Forbidden unless the recipe protects updates as the owner asks.

    The functions below say what a recipe does; a way to protect updates is made known there.

    Args:
        min_cohort: silos that an update must be read together with, itself included.
    """
    if rules.require_masks and not masked(recipe):
        raise Forbidden(
            "this silo's policy lets an update leave only under masks (privacy.require_masks), and the recipe has no "
            "guard 'mask'",
            "privacy.require_masks",
        )
    if cohort(recipe) < min_cohort:
        raise Forbidden(
            f"this silo's policy lets an update be read only in a sum of {min_cohort} silos (min_cohort), and "
            "the recipe has no guard 'mask': the coordinator would read each by itself",
            "min_cohort",
        )
    _check_unit(rules, recipe)
    limit, spent = rules.max_epsilon, epsilon(recipe)
    if limit is not None and (spent is None or spent > limit):
        opened = recipe.privacy is not None and not withheld(recipe)
        unbounded = "lets figures leave outside it (privacy.figures: open)" if opened else "does not bound it"
        what = unbounded if spent is None else f"spends {spent:g}"
        raise Forbidden(
            f"this silo's policy allows an epsilon of {limit:g} per {rules.per} (privacy.max_epsilon), and "
            f"the recipe {what}",
            "privacy.max_epsilon",
        )


_INSISTED = {
    "example": ("each row is", ("example", "user"), "`privacy.unit: example` or `user`"),
    "user": ("all rows of a person together are", ("user",), "`privacy.unit: user`"),
    "silo": ("the silo as a whole is", ("silo",), "`privacy.unit: silo` and the guard 'mask'"),
}
"""By the unit that an owner insists on: what it means, which units do it, and what the recipe says then."""


def _check_unit(rules: PrivacyRules, recipe: Recipe) -> None:
    """Forbidden unless noise of the silo's own protects the unit that the owner insists on."""
    if rules.unit is None:
        return
    whose, enough, needed = _INSISTED[rules.unit]
    if unit(recipe) in enough:
        return
    if recipe.privacy is None:
        what = "the recipe has no section `privacy`"
    elif not withheld(recipe):
        what = "the recipe lets a silo's figures leave outside the guarantee (privacy.figures: open)"
    elif unit(recipe) is None:
        what = f"the recipe leaves noise to the coordinator (privacy.unit: {recipe.privacy.unit}, and no guard 'mask')"
    else:
        what = f"the recipe has `privacy.unit: {recipe.privacy.unit}`"
    raise Forbidden(
        f"this silo's policy takes part only where {whose} protected by noise of the silo's own (privacy.unit: "
        f"{rules.unit}), and {what}; it needs {needed}",
        "privacy.unit",
    )


def unit(recipe: Recipe) -> str | None:
    """Whose data a run of this recipe protects as a whole by noise of this silo's own; None where there is none, or
    where figures leave outside the guarantee."""
    own = withheld(recipe) and (noised_in_training(recipe) or noised_by_silos(recipe))
    return recipe.privacy.unit if own and recipe.privacy is not None else None


def masked(recipe: Recipe) -> bool:
    """Whether the coordinator sees sums of updates alone."""
    return any(guard.name == "mask" for guard in recipe.guards)


def cohort(recipe: Recipe) -> int:
    """Of how many silos' updates the coordinator sees sums at least, as far as the recipe says; how many they are in a
    round the silo sees before it masks anything, and does not take part in a smaller sum."""
    if not masked(recipe):
        return 1
    return recipe.federation.sample if isinstance(recipe.federation.sample, int) else MOST


def epsilon(recipe: Recipe) -> float | None:
    """The epsilon that a run of this recipe spends at most, by noise of this silo's own; None where nothing that the
    silo can see to bounds it: noise of the coordinator's is no matter of this policy."""
    return recipe.privacy.epsilon if recipe.privacy is not None and unit(recipe) is not None else None


def check_text(rules: PrivacyRules, asked: float | None) -> None:
    """Forbidden unless text that is shown in context has as much noise as the owner asks for."""
    limit = rules.max_token_epsilon
    if limit is not None and (asked is None or asked > limit):
        what = "asks for no noise" if asked is None else f"has an epsilon of {asked:g} a token"
        raise Forbidden(
            f"this silo's policy lets rows be shown in context only with noise on their text, of an epsilon of at most "
            f"{limit:g} a token (privacy.max_token_epsilon), and the recipe {what} (in_context.token_epsilon)",
            "privacy.max_token_epsilon",
        )
