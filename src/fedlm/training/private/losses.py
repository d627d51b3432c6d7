"""The loss of each example by itself, for the objectives that have one.

DP-SGD bounds what one example adds to a step. That holds only if nothing else in the step depends on it: not the
divisor, not a baseline, not the weight of its neighbours. An objective is admitted here by name, with its own rule, or
refused with the reason.

The unit is one `Example`, or all of a user's together. A task that makes several of a row (a selector asks in both
orders, a long document is cut) protects each of them, and a row as a group of as many; a user with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedlm.errors import TrainingError
from fedlm.training.forward import model_device
from fedlm.training.objective import Likelihood, Objective
from fedlm.training.sequences import Example
from fedlm.training.tasks.classify import CrossEntropy
from fedlm.training.tasks.group_preference import InContext
from fedlm.training.tasks.label_words import WordLoss
from fedlm.training.tasks.preference import PreferenceObjective
from fedlm.training.tasks.reinforce import PolicyGradient
from fedlm.training.tasks.reward import BradleyTerry
from fedlm.training.tasks.selector import LetterLoss

MEANS = (CrossEntropy, WordLoss, BradleyTerry, LetterLoss)
"""Objectives whose terms are one for each example and whose divisor is the number of examples."""

ONE_TARGET = (WordLoss, LetterLoss)
"""Objectives that read one target of a sequence, its last token."""


def example_losses(objective: Objective, examples: Sequence[Example]) -> Tensor:
    """What the objective gives each example as the only one of a step [n], fp32, differentiable.

    Raises:
        TrainingError: see `require_separable`.
    """
    require_separable(objective, examples)
    if isinstance(objective, PreferenceObjective):
        return _preference(objective, examples)
    chosen = objective.begin(examples)
    terms, _ = objective.terms(chosen)
    if not isinstance(objective, Likelihood):
        return terms
    counts = torch.tensor([e.targets for e in chosen], device=terms.device)
    owners = torch.repeat_interleave(torch.arange(len(chosen), device=terms.device), counts)
    return torch.zeros(len(chosen), device=terms.device).index_add(0, owners, terms) / counts


def _preference(objective: Any, examples: Sequence[Example]) -> Tensor:
    chosen = objective.begin(examples)
    if objective.preference.loss == "orpo":  # each example's likelihood by its own tokens, not by the step's
        counts = [e.sequences[0].targets + e.sequences[2].targets for e in chosen]
        objective.number, objective.targets = 1, torch.tensor(counts, device=model_device(objective.tools.model))
    losses: Tensor = objective.terms(chosen)[0]
    return losses


def require_separable(objective: Objective, examples: Sequence[Example]) -> None:
    """Refuse an objective with which one example changes what others add.

    Raises:
        TrainingError: with the reason.
    """
    reason = _coupling(objective, examples)
    if reason:
        raise TrainingError(f"this objective cannot be trained privately by example: {reason}")


def _coupling(objective: Objective, examples: Sequence[Example]) -> str:
    kind = type(objective)
    if kind in (Likelihood, *MEANS):
        return ""
    if isinstance(objective, PreferenceObjective):
        if objective.preference.loss == "kto":
            return "KTO compares every answer with a baseline over the whole step, and with other rows' answers"
        if any("weight" in example.facts for example in examples):
            return "the weights of preference objectives depend on how many rows of each the silo has"
        return ""
    if isinstance(objective, InContext):
        return "rows are predicted from a context that is made of other rows"
    if isinstance(objective, PolicyGradient):
        return "answers are written for a whole step at once, and their number of tokens divides all of them"
    return f"{kind.__name__} is not known to keep examples apart"
