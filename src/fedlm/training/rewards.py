"""What a written answer earns: by the right answer that its row has, or by a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import TrainingError
from fedlm.models.folders import local_path
from fedlm.recipe.reinforce import RewardSource
from fedlm.training.answers import exact_match, f1, last_number, parse_answer


@dataclass(frozen=True)
class Asked:
    """A prompt and what is known of its right answer."""

    turns: tuple[tuple[str, str], ...]
    """(role, content) before the answer."""
    references: tuple[str, ...]
    """Right answers as text."""
    choices: tuple[str, ...] = ()
    """Of a multiple-choice row, whose right choice is the first reference."""


Reward = Callable[[Sequence[Asked], Sequence[str]], NDArray[np.float64]]
"""What each text earns as an answer [n]."""


def reward_of(source: RewardSource) -> Reward:
    """The recipe's reward. A reward model is loaded here.

    Raises:
        ModelError: there is no reward model in that run.
    """
    if source.kind == "model":
        assert source.run is not None
        return _checked(_by_model(local_path(source.run)))
    rule = {"answer": _names_it, "f1": _words, "number": _same_number}[source.kind]
    return lambda asked, texts: np.array([rule(a, text) for a, text in zip(asked, texts, strict=True)], np.float64)


def _names_it(asked: Asked, text: str) -> float:
    if asked.choices:
        return float(parse_answer(text, asked.choices) == asked.choices.index(asked.references[0]))
    return exact_match(text, asked.references)


def _words(asked: Asked, text: str) -> float:
    return f1(text, asked.references)


def _same_number(asked: Asked, text: str) -> float:
    found = last_number(text)
    return float(found is not None and found in {last_number(right) for right in asked.references})


def _by_model(run: Path) -> Reward:
    from fedlm.training.reward_model import load_reward

    model = load_reward(run)

    def reward(asked: Sequence[Asked], texts: Sequence[str]) -> NDArray[np.float64]:
        # An empty answer is one of no words, which a template cannot show; a space is the nearest that it can.
        answered = [(*a.turns, ("assistant", text or " ")) for a, text in zip(asked, texts, strict=True)]
        return model.rewards([[{"role": role, "content": content} for role, content in turns] for turns in answered])

    return reward


def _checked(reward: Reward) -> Reward:
    def finite(asked: Sequence[Asked], texts: Sequence[str]) -> NDArray[np.float64]:
        found = reward(asked, texts)
        if not np.isfinite(found).all():
            bad = int(np.flatnonzero(~np.isfinite(found))[0])
            raise TrainingError(
                f"the reward of an answer is {found[bad]}, so nothing can be learnt from it",
                where="reinforce.reward",
                fix="train the reward model again with a lower rate, or choose another",
            )
        return found

    return finite


def advantages(rewards: NDArray[np.float64], method: str, *, scale: bool) -> NDArray[np.float64]:
    """How much better each answer is than the others to its prompt: [prompts, completions], as the rewards.

    grpo  (r - mean) / (standard deviation + 1e-4), or r - mean without `scale` (Shao et al., 2024, section 4.1.2)
    rloo  r minus the mean of the other answers (Ahmadian et al., ACL 2024, section 3.3)

    The standard deviation is that of a sample (divided by n - 1), as TRL has it.
    """
    others: NDArray[np.float64] = rewards - rewards.mean(axis=1, keepdims=True)
    if method == "rloo":
        number = rewards.shape[1]
        others *= number / (number - 1)
    elif scale:
        others /= rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4
    return others
