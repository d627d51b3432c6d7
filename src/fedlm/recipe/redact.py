"""Personal data to be replaced in rows before anything is trained: a part of a recipe's `data`, or of a silo's own
data file."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fedlm.recipe.strict import Strict

PersonalKind = Literal["email", "phone", "iban", "card", "ip", "url", "ssn", "steuer_id", "dni"]


def _region(code: str) -> str:
    if not re.fullmatch("[A-Z]{2}", code):
        raise ValueError(f"'{code[:20]}' is no country's code: write two capital letters, such as US or ES")
    return code


class RedactSpec(Strict):
    """What is looked for in every row, whatever its role, and replaced by its kind in brackets: '[EMAIL]'.

    Patterns and checksums alone: names, addresses and what is written out in words stay (see the docs on security).
    """

    kinds: list[PersonalKind] = Field(
        default_factory=lambda: ["email", "phone", "iban", "card", "ip", "url", "ssn", "steuer_id", "dni"],  # type: ignore[arg-type]
        description="email; phone (needs the extra [redact]); iban and card, by their checksums; ip; url: those that "
        "hold a password; ssn (US), steuer_id (Germany), dni (Spain, with NIE).",
    )
    phone_regions: list[Annotated[str, AfterValidator(_region)]] = Field(
        default_factory=list,
        description="Countries whose numbers are found without '+' and country code too, such as [ES, US].",
    )
    numbered: bool = Field(
        False, description="Number what is found within a row, the same value alike: '[EMAIL_1] wrote to [EMAIL_2]'."
    )
