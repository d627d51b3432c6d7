"""Reinforcement in a recipe: which policy gradient, how many answers it compares, and what an answer earns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from fedlm.recipe.data_checks import Problem, all_sources, changed, kind_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.strict import Strict

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

TASK = "reinforce"
BETA = {"grpo": 0.0, "rloo": 0.05}
"""TRL's defaults."""


class RewardSource(Strict):
    """What an answer earns."""

    kind: Literal["answer", "f1", "number", "model"] = Field(
        "answer",
        description="'answer': 1 if the text names the right choice, or is one of a message row's right answers; 'f1': "
        "words in common with the row's answer; 'number': 1 if the last number in the text is the one in the row's "
        "answer; 'model': what a reward model says.",
    )
    run: str | None = Field(None, description="With 'model': a run of task 'reward'; starts from the recipe's folder.")


class ReinforceSpec(Strict):
    """For `task: reinforce`. `training.batch_size` counts prompts; each is answered `completions` times."""

    method: Literal["grpo", "rloo"] = "grpo"
    completions: Annotated[int, Field(ge=2)] = Field(4, description="Answers to a prompt, which are compared.")
    max_new_tokens: PositiveInt = Field(32, description="Of an answer.")
    beta: Annotated[float, Field(ge=0.0)] | None = Field(
        None, description="Strength of the KL to the model that the run began with. Default: grpo 0, rloo 0.05."
    )
    loss: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "dapo",
        description="grpo: what token losses are divided by: each answer's length, then the answers; all answers' "
        "tokens; or answers times `max_new_tokens`.",
    )
    scale_rewards: bool = Field(True, description="grpo: divide by the standard deviation among a prompt's answers.")
    reward: RewardSource = RewardSource()

    @property
    def strength(self) -> float:
        """Beta, or the method's own default."""
        return BETA[self.method] if self.beta is None else self.beta


def reinforce_problems(recipe: Recipe) -> Iterator[Problem]:
    """Settings of reinforcement that cannot be kept, or that nothing reads."""
    spec, here, algorithm = recipe.reinforce, ("reinforce",), recipe.federation.algorithm
    if recipe.task != TASK:
        if changed(recipe, "reinforce"):
            yield here, f"has no effect with task '{recipe.task}'"
        return
    for field in ("loss", "scale_rewards"):
        if spec.method != "grpo" and changed(spec, field):
            yield (*here, field), f"has no effect with '{spec.method}' (it belongs to grpo)"
    if (spec.reward.kind == "model") != (spec.reward.run is not None):
        reason = "name the run of the reward model" if spec.reward.run is None else "has no effect without kind: model"
        yield (*here, "reward", "run"), reason
    if spec.reward.kind == "number":
        for path, source in all_sources(recipe.data):
            if kind_of(source.columns) == "choice":
                yield (*path, "columns"), "a choice has no number: use reward.kind 'answer', or map prompt + response"
    if spec.max_new_tokens >= recipe.training.max_length:
        yield (
            (*here, "max_new_tokens"),
            f"leaves no room for a prompt within `training.max_length` ({recipe.training.max_length})",
        )
    if recipe.adapter.dropout > 0:
        yield ("adapter", "dropout"), "answers are written without it, so the policy would be another one in training"
    if recipe.adapter.kind == "full" and spec.strength > 0:
        yield (
            (*here, "beta"),
            "the KL is to the model as it was at the start, which full training overwrites: train an adapter, or set "
            "it to 0",
        )
    if algorithm.weights == "tokens":
        yield (
            ("federation", "algorithm", "weights"),
            "rows are prompts without target tokens: weight silos by examples, or equally",
        )
    if ALGORITHMS[algorithm.name].losses:
        yield (
            ("federation", "algorithm", "name"),
            f"'{algorithm.name}' compares losses of models, and a policy gradient's loss says nothing of its model",
        )
    if any(capacity.memory is not None for capacity in recipe.federation.capacity.all):
        yield (
            ("federation", "capacity"),
            "memory is planned for text that there is, not for answers: give rank, layers or micro_batch_size",
        )
