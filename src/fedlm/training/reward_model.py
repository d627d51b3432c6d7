"""A trained reward model at work: conversations in, one number each out; frozen, batched, packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedlm.errors import DataError, ModelError
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, set_tensors
from fedlm.models.export import load_adapter
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.heads import outputs_of
from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS
from fedlm.training.scores import scores_of
from fedlm.training.sequences import Encoded
from fedlm.training.tasks.reward import conversation

Messages = Sequence[dict[str, str]]
"""Turns {role, content}, of which the last is the assistant's."""


@dataclass(frozen=True)
class RewardModel:
    """A model with a trained head, and what it reads conversations with."""

    model: nn.Module
    tokenizer: Any
    packing: bool = True

    def rewards(self, conversations: Sequence[Messages], batch_tokens: int = 2048) -> NDArray[np.float64]:
        """See `score_texts`."""
        return score_texts(self.model, self.tokenizer, conversations, batch_tokens, packing=self.packing)


def score_texts(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Messages],
    batch_tokens: int = 2048,
    *,
    packing: bool = True,
) -> NDArray[np.float64]:
    """The reward [n] of each conversation, without gradients. Answers to one prompt should be neighbours: the prompt
    is then computed once.

    Args:
        model: with a head of one output; its training flag stays as it was.
        batch_tokens: tokens per forward pass.

    Raises:
        DataError: a conversation does not end with the assistant's turn, the chat template refuses it, or it is longer
            than the model's context (by its place in the list, without its text).
        ModelError: the model has no such head, or gives a reward that is not finite.
    """
    config: Any = model.config
    limit = int(config.max_position_embeddings)
    found = [read(tokenizer, messages, limit, f"conversation {i}") for i, messages in enumerate(conversations)]
    scores = scores_of(model, found, batch_tokens, packing=packing)
    if scores.shape[1] != 1:
        raise ModelError(f"a reward model gives one number, and this head gives {scores.shape[1]}")
    if not np.isfinite(scores).all():
        raise ModelError("the reward model gives a reward that is not finite", fix="train it again with a lower rate")
    return scores[:, 0]


def read(tokenizer: Any, messages: Messages, limit: int, where: str) -> Encoded:
    """A conversation that ends with what the assistant says, in tokens.

    Raises:
        DataError: it does not, the chat template refuses it, or it has more than `limit` tokens; names `where`.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError("only what the assistant says last can be judged", where=where)
    return conversation(tokenizer, list(messages[:-1]), messages[-1]["content"], limit, where)


def load_reward(run: Path, *, device: str | None = None) -> RewardModel:
    """The reward model that a finished run of `task: reward` left.

    Args:
        run: the run directory.
        device: in place of the recipe's.

    Raises:
        ModelError: the run trained something else, or has left no adapter.
    """
    recipe, tensors = reward_tensors(run)
    model = attach(load_base(recipe.model, device=device), recipe.adapter, recipe.seed, outputs_of(recipe))
    set_tensors(model, tensors, recipe.adapter)
    model.requires_grad_(False)
    model.eval()
    return RewardModel(model, load_tokenizer(recipe.model, needs_template=True), recipe.training.packing)


def reward_tensors(run: Path) -> tuple[Recipe, Tensors]:
    """The recipe of a reward model's run, and what it trained: adapter and head. Raises ModelError as `load_reward`."""
    if not (run / "recipe.yaml").is_file():
        raise ModelError("there is no run here (no recipe.yaml)", where=str(run), fix="give a run directory")
    recipe = load_recipe(run / "recipe.yaml")
    if TASKS[recipe.task].head != "score":
        raise ModelError(
            f"this run trained task '{recipe.task}', and rewards come from task 'reward'",
            where=str(run),
            fix="train one with `fedlm init --template reward`",
        )
    if not (run / "adapter").is_dir():
        raise ModelError("the run has left no adapter yet", where=str(run), fix="finish it with fedlm run --resume")
    return recipe, load_adapter(run / "adapter", recipe.adapter)
