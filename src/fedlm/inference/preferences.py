"""A trained predictor of groups' preferences at work: examples of a group in, what it prefers of other answers out.

Nothing is trained, so the group may be one that took no part in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlm.errors import DataError, ModelError
from fedlm.inference.session import run_recipe, run_tensors
from fedlm.models.adapters import attach, set_tensors
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.tasks import TASKS
from fedlm.training.objective import sequences_of
from fedlm.training.reward_model import Messages, read
from fedlm.training.scores import mean_states
from fedlm.training.sequences import Example
from fedlm.training.tasks.group_preference import SHARE, gathered, predicted, predictor_of, with_states

Question = Sequence[Messages]
"""Conversations that differ in what the assistant says last, of which one is preferred to another."""


@dataclass(frozen=True)
class GroupPredictor:
    """A frozen model with a trained predictor beside it, and what it reads conversations with."""

    model: nn.Module
    tokenizer: Any

    def shares(
        self,
        context: Sequence[tuple[Question, Sequence[float]]],
        questions: Sequence[Question],
        batch_tokens: int = 2048,
    ) -> list[NDArray[np.float64]]:
        """The share of a group that prefers each conversation: of every question numbers that add up to 1.

        Args:
            context: of the group, questions and the share of it that prefers each conversation; of a pair (1, 0). Only
                their proportions count. About as many as `group_preference.context` in the run's recipe.
            questions: each is predicted by itself.
            batch_tokens: tokens of a forward pass of the language model.

        Raises:
            DataError: there is no context, a question has fewer than two conversations or not one share for each, or a
                conversation does not end with the assistant's turn or is longer than the model's context (by its place,
                without its text).
        """
        if not context:
            raise DataError("there is nothing to tell the group by", fix="give some questions and what it prefers")
        shown = [self._example(question, f"example {i}", shares) for i, (question, shares) in enumerate(context)]
        asked = [self._example(question, f"question {i}") for i, question in enumerate(questions)]
        ids = [sequence.ids.tolist() for sequence in sequences_of([*shown, *asked])]
        both = with_states([*shown, *asked], mean_states(self.model, ids, batch_tokens).astype(np.float32))
        group, predictor = gathered(both[: len(shown)]), predictor_of(self.model)
        with torch.no_grad():
            found = [predicted(predictor, group, gathered([example]))[0] for example in both[len(shown) :]]
        return [shares.double().cpu().numpy() for shares in found]

    def _example(self, question: Question, where: str, shares: Sequence[float] | None = None) -> Example:
        """A question in tokens; without shares they are all 0."""
        if len(question) < 2:
            raise DataError("a question has at least two conversations to choose from", where=where)
        config: Any = self.model.config
        limit, places = int(config.max_position_embeddings), enumerate(question)
        sequences = tuple(read(self.tokenizer, m, limit, f"{where}, conversation {i}") for i, m in places)
        known = np.zeros(len(question)) if shares is None else _shares(question, shares, where)
        return Example(sequences, {f"{SHARE}{i}": share for i, share in enumerate(known.tolist())})


def _shares(question: Question, shares: Sequence[float], where: str) -> NDArray[np.float64]:
    """Shares that add up to 1, one for each conversation."""
    found = np.asarray(shares, np.float64)
    if found.shape != (len(question),) or not np.isfinite(found).all() or (found < 0).any() or not found.sum() > 0:
        raise DataError(
            f"a question with {len(question)} conversations needs as many shares, none negative and not all 0",
            where=where,
        )
    whole: NDArray[np.float64] = found / found.sum()
    return whole


def load_predictor(run: Path, *, device: str | None = None) -> GroupPredictor:
    """The predictor that a run of `task: group-preference` trained: of its `adapter`, or of its best round so far.

    Args:
        run: the run directory.
        device: in place of the recipe's.

    Raises:
        ModelError: the run trained something else.
        RunError: there is no run, or it has trained nothing yet.
    """
    recipe = run_recipe(run)
    if TASKS[recipe.task].head != "predictor":
        raise ModelError(
            f"this run trained task '{recipe.task}', and preferences of groups come from 'group-preference'",
            where=str(run),
        )
    tensors, _ = run_tensors(run)
    model = attach(load_base(recipe.model, device=device), recipe.adapter, recipe.seed)
    set_tensors(model, tensors, recipe.adapter)
    model.requires_grad_(False)
    model.eval()
    return GroupPredictor(model, load_tokenizer(recipe.model, needs_template=True))
