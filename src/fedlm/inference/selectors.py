"""The selectors of a run of `task: selector` at work: which of two answers is better, by the vote of all of them.

An answer that pleases one selector by a fault of that selector does not please the others: a vote is harder to hack
than a single judge (Wu et al., ICLR 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedlm.algorithms.ifca import cluster
from fedlm.errors import DataError, ModelError
from fedlm.federation.rundir import RunDir
from fedlm.inference.session import run_recipe, run_tensors
from fedlm.messages import Tensors
from fedlm.models.adapters import attach, completed, set_tensors
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.schema import Recipe
from fedlm.training.scores import choices_of
from fedlm.training.tasks.selector import asked, letter_tokens


@dataclass(frozen=True)
class Selectors:
    """One base model, and the values of several adapters that are put into it in turn."""

    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    adapters: Sequence[Tensors]

    def margins(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], batch_tokens: int = 2048
    ) -> NDArray[np.float64]:
        """How much each selector prefers the first answer, [selectors, prompts]: the sum of its log-odds in both
        orders, so that a preference for a letter plays no role.

        Raises:
            DataError: not one answer each for every prompt, or a question longer than the model's context.
        """
        if not len(prompts) == len(first) == len(second):
            raise DataError(
                f"there are {len(prompts)} prompts, {len(first)} and {len(second)} answers: give two to every prompt"
            )
        config: Any = self.model.config
        questions = [
            asked(
                self.tokenizer, [{"role": "user", "content": prompt}], pair, config.max_position_embeddings, f"pair {i}"
            )
            for i, (prompt, *both) in enumerate(zip(prompts, first, second, strict=True))
            for pair in ((both[0], both[1]), (both[1], both[0]))
        ]
        letters, packing = letter_tokens(self.tokenizer), self.recipe.training.packing
        found = np.zeros((len(self.adapters), len(prompts)))
        for j, values in enumerate(self.adapters):
            set_tensors(self.model, values, self.recipe.adapter)
            logits = choices_of(self.model, questions, letters, batch_tokens, packing=packing)
            odds = logits[:, 0] - logits[:, 1]
            found[j] = odds[0::2] - odds[1::2]
        return found

    def vote(self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> NDArray[np.float64]:
        """The share of the selectors that prefer the first answer, [prompts]; undecided ones count half."""
        margins = self.margins(prompts, first, second)
        return ((margins > 0) + 0.5 * (margins == 0)).mean(axis=0)  # type: ignore[no-any-return]


def load_selectors(run: Path, *, device: str | None = None) -> Selectors:
    """The selectors that a run trained: those of its last checkpoint, or the one of its adapter.

    Raises:
        ModelError: the run trained something else.
        RunError: there is no run, or it has trained nothing yet.
    """
    recipe = run_recipe(run)
    if recipe.task != "selector":
        raise ModelError(f"this run trained task '{recipe.task}', and selectors come from 'selector'", where=str(run))
    model = attach(load_base(recipe.model, device=device), recipe.adapter, recipe.seed)
    model.requires_grad_(False)
    model.eval()
    return Selectors(recipe, model, load_tokenizer(recipe.model, needs_template=True), _adapters(run, recipe))


def _adapters(run: Path, recipe: Recipe) -> list[Tensors]:
    """Of a method with several models all of them."""
    checkpoint = RunDir.open(run, write=False).load_checkpoint()
    several = [] if checkpoint is None else [cluster(checkpoint.parameters, j) for j in _clusters(recipe)]
    if several and all(several):
        return [completed(values, recipe) for values in several]
    return [run_tensors(run)[0]]


def _clusters(recipe: Recipe) -> range:
    return range(recipe.federation.algorithm.clusters)
