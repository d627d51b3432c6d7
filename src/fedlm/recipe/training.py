"""Local training inside a silo."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from fedlm.recipe.strict import Strict
from fedlm.recipe.types import Fraction


class TrainingSpec(Strict):
    """Local training inside a silo."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 5e-4
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), strict=False, description="For adamw.")
    momentum: Fraction = Field(0.0, description="For sgd.")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Over the whole run's progress.")
    warmup: Fraction = Field(0.0, description="Share of the whole run in which the rate rises from 0.")
    final_lr: Fraction = Field(0.0, description="Rate at the end as a share of `lr`.")
    steps: PositiveInt | None = Field(None, description="Optimiser steps per silo and round (this or `epochs`).")
    epochs: PositiveFloat | None = Field(None, description="Passes over the silo's training rows per round.")
    batch_size: PositiveInt = Field(8, description="Examples per optimiser step.")
    order: Literal["rounds", "stream"] = Field(
        "rounds",
        description="'rounds': each round draws its own order of the silo's examples. 'stream': one order over the "
        "whole run, epoch after epoch; a round continues where the one before it ended.",
    )
    micro_batch_size: PositiveInt | None = Field(None, description="Examples per forward pass; the rest accumulates.")
    max_length: PositiveInt = Field(512, description="Tokens; longer examples are cut.")
    clip_norm: PositiveFloat | None = 1.0
    spike_guard: PositiveFloat | None = Field(
        None,
        description="Skip a step whose loss or gradient norm is more than so many standard deviations above the mean "
        "of the silo's last 128 steps; counts from 64 steps on. 6 is usual.",
    )
    packing: bool = Field(True, description="No padding: examples lie end to end, attending to themselves only.")
    gradient_checkpointing: bool = False
    compile: bool = False
    keep_optimizer: bool = Field(False, description="Keep the optimiser's moments in the silo between rounds.")

    @property
    def keeps(self) -> bool:
        """Whether training in a round depends on what it left in the silo in an earlier one."""
        return self.keep_optimizer or self.spike_guard is not None

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError("`micro_batch_size` cannot exceed `batch_size`")
        return self
