"""Instructions that a silo makes of its own text: a part of a recipe's `data`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveInt

from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.data_checks import Path, Problem
    from fedlm.recipe.schema import Recipe

HERE: Path = ("data", "instructions")


class InstructionExample(Strict):
    """How one text became an instruction and its response. Public: it travels with the recipe."""

    text: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    response: str = Field(min_length=1)


class InstructionSpec(Strict):
    """Rows of text become instruction and response in the silo, written by the model that the run begins with, shown
    the examples most like each text (FedIT-U2S: Ye et al., 2024)."""

    pool: list[InstructionExample] = Field(min_length=1, description="Public examples to choose from.")
    shots: PositiveInt = Field(2, description="Examples shown with each text, the most like it of the pool.")
    temperature: Annotated[float, Field(ge=0.0)] = Field(0.7, description="Of the draws; 0: the likeliest words.")
    max_new_tokens: PositiveInt = Field(128, description="Of an instruction and its response.")
    min_words: PositiveInt = Field(3, description="Fewest words of an instruction; shorter ones are not used.")
    show_text: bool = Field(False, description="Training shows the text after the instruction.")


def instruction_problems(recipe: Recipe) -> Iterator[Problem]:
    """What making instructions cannot be combined with, or would not read."""
    spec = recipe.data.instructions
    if spec is None:
        return
    if "messages" not in TASKS[recipe.task].kinds:
        yield HERE, f"has no effect on task '{recipe.task}', which learns from no messages"
    if recipe.adapter.kind == "full":
        yield HERE, "not with full weights: the model that the run began with, which writes them, is trained away"
    if spec.shots > len(spec.pool):
        yield (*HERE, "shots"), f"the pool holds {len(spec.pool)} example(s)"
