"""What a silo leaves out of its answers where masks or a budget of differential privacy hide what it would tell."""

from __future__ import annotations

from fedlm.federation.silo.trained import WITHIN
from fedlm.messages import Fields, Observe
from fedlm.recipe.guards import mask_of
from fedlm.recipe.privacy import withheld
from fedlm.recipe.prompting import drawn_anew
from fedlm.recipe.schema import Recipe


def told_of_rows(card: Fields, recipe: Recipe) -> Fields:
    """A data card as it may leave."""
    if mask_of(recipe) is not None:
        card = coarse(card)
    if withheld(recipe):
        card = sparse(card, recipe)
    return {**card, "labels": {}} if drawn_anew(recipe) else card


def coarse(card: Fields) -> Fields:
    """A data card that says of rows how many there are at most, in powers of two, and nothing of labels: a silo's
    weight is hidden under the mask, and so are counts over rows that it holds out, and this would tell them."""
    rows = {role: _power_of_two(count) for role, count in card["rows"].items()}
    users = {"users": _power_of_two(card["users"])} if "users" in card else {}
    return {**card, "rows": rows, "labels": {}, **users}


def _power_of_two(count: int) -> int:
    return 1 << (int(count) - 1).bit_length() if count else 0


def sparse(card: Fields, recipe: Recipe) -> Fields:
    """A data card without figures of rows that noise does not cover: none of labels and of what is held out, and of
    training rows their number only where examples are protected; where users are, their number in its place."""
    train = int(card["rows"]["train"])
    if recipe.privacy is not None and recipe.privacy.unit != "example":
        train = min(1, train)
    return {**card, "rows": {"train": train, "validation": 0, "test": 0}, "labels": {}}


PUBLIC = ("steps", "rank", "rows", "repeated")
"""What a reply to `train` says beside an update under a guarantee. The recipe and the card say the same."""


def told(fields: Fields, recipe: Recipe) -> Fields:
    """The fields of a reply to `train` that may leave."""
    if not withheld(recipe):
        return fields
    assert recipe.privacy is not None
    names = PUBLIC if recipe.privacy.unit == "example" else [name for name in PUBLIC if name != "rows"]
    if recipe.privacy.adaptive is not None and mask_of(recipe) is None:  # under a mask it is in the sum
        names = [*names, WITHIN]
    return {name: fields[name] for name in names if name in fields}


def without_noise(recipe: Recipe, verb: str) -> str:
    """Why the answer to a verb would tell of rows what no noise covers; empty where it does not."""
    if drawn_anew(recipe) and verb not in ("hello", "answer"):
        return f"only answers have noise in this run (in_context.token_epsilon), and '{verb}' tells of rows without it"
    if recipe.privacy is None or verb in ("hello", "train"):
        return ""
    if verb == "evaluate":
        return "this run's recipe lets no figure leave (privacy.figures: withheld)" if withheld(recipe) else ""
    return f"the answer to '{verb}' has no noise, and this run's recipe asks for privacy"


def quiet(observe: Observe) -> Observe:
    """Progress without figures of the training, which masks hide."""
    return lambda event: observe({k: v for k, v in event.items() if k not in ("loss", "tokens_per_second")})
