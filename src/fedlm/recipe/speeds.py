"""How fast the silos of a simulated asynchronous federation are: a part of its recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from fedlm.recipe.strict import Strict


class SpeedSpec(Strict):
    """Whose answer comes when in an asynchronous simulation: time passes on a virtual clock, a silo's optimiser step
    taking as long as is drawn for this silo. Over a network the answers come when they come."""

    kind: Literal["lognormal", "pareto", "fixed", "recorded"] = Field(
        "lognormal",
        description="Seconds of a step, drawn once for each silo: seconds * exp(sigma z); seconds * u^(-1/shape); all "
        "the same. 'recorded': answers count in the order of another run's `log`.",
    )
    seconds: PositiveFloat = Field(
        1.0, description="Seconds of a step: of the median silo (lognormal), the fastest (pareto), every one (fixed)."
    )
    sigma: PositiveFloat = Field(
        1.0, description="lognormal: with 1 the slowest of 100 silos takes about 150 x the fastest."
    )
    shape: PositiveFloat = Field(1.5, description="pareto: the smaller, the heavier the tail of slow silos.")
    silos: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="Seconds of a step for these silos, in place of drawn ones."
    )
    log: str | None = Field(None, description="recorded: the other run's rounds.jsonl.")
