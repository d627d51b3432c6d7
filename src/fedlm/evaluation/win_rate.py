"""Win rate: of two models' answers to the same prompts, how often the reward model prefers the first one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedlm.errors import DataError
from fedlm.evaluation.intervals import Interval, bootstrap_mean
from fedlm.training.reward_model import RewardModel


@dataclass(frozen=True)
class WinRate:
    """Of n prompts; equal answers and equal rewards are ties."""

    rate: float
    """(wins + ties / 2) / n."""
    interval: Interval
    """95 %, bootstrap over the prompts."""
    wins: int
    ties: int
    losses: int
    margin: float
    """Mean reward of the first model's answers less that of the second's."""


def win_rate(
    scorer: RewardModel, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int = 0
) -> WinRate:
    """Compare two models' answers to the same prompts by a reward model.

    The reward model is itself a model: a policy that was trained on it wins by it. Judge with one that was trained on
    other silos' pairs.

    Args:
        seed: of the bootstrap.

    Raises:
        DataError: there are no prompts, or not one answer of each model for every prompt.
    """
    if not prompts or not len(prompts) == len(first) == len(second):
        raise DataError(
            f"a win rate needs two answers to every prompt: there are {len(prompts)} prompts, {len(first)} and "
            f"{len(second)} answers"
        )
    asked = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, *both in zip(prompts, first, second, strict=True)
        for answer in both
    ]
    rewards = scorer.rewards(asked)
    differ = np.array([one != other for one, other in zip(first, second, strict=True)])
    gaps = np.where(differ, rewards[0::2] - rewards[1::2], 0.0)  # rows of one batch may round differently
    points = (gaps > 0) + 0.5 * (gaps == 0)
    return WinRate(
        float(points.mean()),
        bootstrap_mean(points, seed=seed, purpose="win rate"),
        int((gaps > 0).sum()),
        int((gaps == 0).sum()),
        int((gaps < 0).sum()),
        float(np.mean(gaps)),
    )
