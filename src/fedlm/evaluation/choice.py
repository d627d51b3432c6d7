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
from fedlm.evaluation.prompts import context_length, encode_pair, render_prompt
from fedlm.training.forward import sequence_nll
from fedlm.training.tasks import Encoded


@dataclass(frozen=True)
class ChoiceScores:
    """Per item: the log-likelihood of each choice (nats), and whether the highest is the right one."""

    logprobs: list[np.ndarray]
    correct: np.ndarray
    correct_norm: np.ndarray


def score_choices(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    task_name: str,
    *,
    batch_tokens: int,
    packing: bool = True,
) -> ChoiceScores:
    """Score every choice of every row (`question`, `choices`, `answer`).

    A text longer than the model's context loses tokens at its beginning, as in lm-eval, so answers are always whole.
    """
    limit = context_length(model)
    sequences: list[Encoded] = []
    lengths: list[np.ndarray] = []
    answers: list[int] = []
    for row in rows:
        prompt, delimiter, special = render_prompt(row["question"], tokenizer, task_name)
        for choice in row["choices"]:
            if not choice:
                raise DataError("a choice is empty, so it has no probability", fix="check the `choices` mapping")
            before, after = encode_pair(prompt, delimiter + choice, tokenizer, special=special)
            ids = np.array(before + after, dtype=np.int32)[-limit:]
            first = max(1, len(ids) - len(after))  # the first token of all has nothing to be predicted from
            sequences.append(Encoded(ids=ids, loss=np.arange(len(ids)) >= first))
        lengths.append(np.array([len(choice) for choice in row["choices"]], dtype=np.float64))
        answers.append(int(row["answer"]))
    nll, _ = sequence_nll(model, sequences, batch_tokens, packing=packing)
    ends = np.cumsum([len(item) for item in lengths])
    logprobs = [-nll[end - len(item) : end] for item, end in zip(lengths, ends, strict=True)]
    hits = [int(np.argmax(item)) == answer for item, answer in zip(logprobs, answers, strict=True)]
    hits_norm = [
        int(np.argmax(item / length)) == answer for item, length, answer in zip(logprobs, lengths, answers, strict=True)
    ]
    return ChoiceScores(logprobs, np.array(hits, dtype=bool), np.array(hits_norm, dtype=bool))
