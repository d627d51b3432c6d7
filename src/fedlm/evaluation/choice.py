"""Multiple choice by log-likelihood: the answer is the choice to which the model gives the highest probability.

`acc` compares summed log-probabilities; `acc_norm` divides each by the choice's length in characters first, since a
sum favours short choices. Both are lm-eval's definitions (Gao et al., The Language Model Evaluation Harness).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlm.errors import DataError
from fedlm.evaluation.prompts import encode_pair, render_prompt
from fedlm.evaluation.scoring import grouped_nll
from fedlm.training.generation import context_length
from fedlm.training.sequences import Encoded


@dataclass(frozen=True)
class ChoiceScores:
    """Per item: the log-likelihood of each choice (nats), and whether the highest is the right one."""

    logprobs: list[np.ndarray]
    correct: np.ndarray
    correct_norm: np.ndarray


def encode_choices(row: Mapping[str, Any], tokenizer: Any, task_name: str, limit: int) -> list[Encoded]:
    """One sequence per choice of a row (`question`, `choices`): the question, then the choice as target.

    A text longer than `limit`, the model's context, loses tokens at its beginning, as in lm-eval, so choices are whole.

    Raises:
        DataError: a choice is empty.
    """
    prompt, delimiter, special = render_prompt(row["question"], tokenizer, task_name)
    return encode_after(prompt, row["choices"], tokenizer, limit, delimiter=delimiter, special=special)


def encode_after(
    prompt: str, choices: Iterable[str], tokenizer: Any, limit: int, *, delimiter: str = "", special: bool = False
) -> list[Encoded]:
    """One sequence per choice, as target after a prompt as the model reads it.

    Args:
        special: whether the tokenizer adds its own special tokens.

    Raises:
        DataError: a choice is empty.
    """
    sequences = []
    for choice in choices:
        if not choice:
            raise DataError("a choice is empty, so it has no probability", fix="check the `choices` mapping")
        before, after = encode_pair(prompt, delimiter + choice, tokenizer, special=special)
        # the last token is predicted and never read, so one more than the context fits
        ids = np.array(before + after, dtype=np.int32)[-(limit + 1) :]
        first = max(1, len(ids) - len(after))  # the first token of all has nothing to be predicted from
        sequences.append(Encoded(ids=ids, loss=np.arange(len(ids)) >= first))
    return sequences


def judge_choices(rows: Iterable[Mapping[str, Any]], logprobs: list[np.ndarray]) -> ChoiceScores:
    """Which choice wins in each row, by sum and per character; the first of equals, as in lm-eval."""
    correct, correct_norm = [], []
    for row, values in zip(rows, logprobs, strict=True):
        characters = np.array([len(choice) for choice in row["choices"]], dtype=np.float64)
        correct.append(int(np.argmax(values)) == int(row["answer"]))
        correct_norm.append(int(np.argmax(values / characters)) == int(row["answer"]))
    return ChoiceScores(logprobs, np.array(correct, dtype=bool), np.array(correct_norm, dtype=bool))


def score_choices(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    task_name: str,
    *,
    batch_tokens: int,
    packing: bool = True,
) -> ChoiceScores:
    """Score every choice of every row (`question`, `choices`, `answer`)."""
    listed = list(rows)
    groups = [encode_choices(row, tokenizer, task_name, context_length(model)) for row in listed]
    scored = grouped_nll(model, groups, batch_tokens=batch_tokens, packing=packing)
    return judge_choices(listed, [-nll for nll, _ in scored])
