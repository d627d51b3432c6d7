"""Whom a recipe makes a silo trust, and with what; and what it leaves unprotected: all by the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator

from fedlm.recipe.guards import mask_of
from fedlm.recipe.privacy import by_user, noised_in_training, withheld
from fedlm.recipe.prompting import drawn_anew, frozen
from fedlm.recipe.schema import Recipe


def trusted(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Who could learn of rows if they wanted to, as (who, what they are trusted with)."""
    spec, mask = recipe.privacy, mask_of(recipe)
    yield "each silo's owner", "its own rows, and honest training on them"
    if mask is not None:
        kind = "even if it does not keep to the protocol" if mask.coordinator == "malicious" else "if it keeps to it"
        yield (
            "the coordinator",
            f"sums of updates alone, {kind}; not more than {mask.corrupt:.0%} of a round's silos may help it",
        )
    elif spec is not None and noised_in_training(recipe):
        unit = {"example": "row", "user": "user"}[spec.unit]
        yield "the coordinator", f"noised updates, which tell of a {unit} no more than the guarantee says"
    elif spec is not None:
        bit = " and its bit" if spec.adaptive is not None else ""
        yield "the coordinator", f"each silo's clipped update{bit} without noise, and adding the noise"
    elif drawn_anew(recipe):
        yield "the coordinator", "answers, which tell of a row's tokens no more than the noise on them lets through"
    elif frozen(recipe):
        yield "the coordinator", "each silo's figures, which tell whether a guess fits its rows"
    else:
        yield "the coordinator", "each silo's update, from which rows can be reconstructed"
    if spec is None and not frozen(recipe):
        yield "whoever gets the models", "what they have memorised"
    yield "whoever carries the messages", "nothing but their sizes and times (mutual TLS over a network)"


def open_ends(recipe: Recipe) -> Iterator[str]:
    """What this recipe leaves unprotected."""
    spec, masked = recipe.privacy, mask_of(recipe) is not None
    if frozen(recipe):
        yield from _of_figures(recipe)
        return
    if spec is None:
        yield "No differential privacy: the final model, and each update or sum, may tell of single rows."
    if spec is None and not masked:
        yield "No masks: the coordinator sees each silo's update by itself."
    if spec is not None and spec.figures == "open":
        yield "Figures of silos leave without noise (`privacy.figures: open`): the guarantee does not cover them."
    if spec is not None and recipe.start is not None:
        yield "The run starts from another run's model: what that tells of rows is not in this budget."
    if spec is not None and spec.unit == "silo" and not masked:
        yield "Noise in floating point: its last bits are no proof against whoever sees them (Mironov, 2012)."
    if noised_in_training(recipe):
        yield "How long a silo's round takes depends on which rows were drawn, and can be seen."
    if by_user(recipe):
        yield "A person with rows in k silos has the guarantee of each; of all together, k times the epsilon and delta."
        yield "A person whose rows go by several names has the guarantee of each name."
    if spec is not None and spec.unit == "example":
        yield "A row that is in several silos, or a person with several rows, has less protection than one row."
    if spec is not None:
        yield "Where a silo fails, the sentence that says why may hold a count of its rows."
    if masked and not withheld(recipe):
        yield "Sums of figures have no noise: what they tell of all silos together is not bounded."
    yield "A silo that trains on false rows is not found out by any of this."


def _of_figures(recipe: Recipe) -> Iterator[str]:
    """The same where nothing is trained."""
    epsilon = recipe.in_context.token_epsilon if recipe.in_context is not None else None
    if epsilon is None:
        yield "No noise: whoever asks on purpose can tell by the figures whether a guessed text is among the rows."
        return
    yield (
        f"Epsilons add up over tokens: two rows of 30 tokens that differ in all of them are told apart by at most "
        f"e^{30 * epsilon:g}, and by less the more alike their tokens are."
    )
    yield (
        "How many tokens a row has is not hidden, and the same rows cost again under another model or epsilon: each "
        "silo's ledger adds that up."
    )
