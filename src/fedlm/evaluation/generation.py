"""Answers by generation: what the model writes, parsed into one of the choices; unparsable answers are counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedlm.evaluation.prompts import render_prompt
from fedlm.training.answers import parse_answer
from fedlm.training.generation import generate


@dataclass(frozen=True)
class GenerationScores:
    """Per item: whether an answer could be read from the text, and whether it is the right one."""

    parsed: np.ndarray
    correct: np.ndarray


def score_generation(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    task_name: str,
    *,
    batch_tokens: int,
    max_new_tokens: int,
) -> GenerationScores:
    """Let the model answer every row (`question`, `choices`, `answer`) greedily and parse what it wrote."""
    items = [(str(row["question"]), list(row["choices"]), int(row["answer"])) for row in rows]
    prompts = []
    for question, _, _ in items:
        text, _, special = render_prompt(question, tokenizer, task_name)
        prompts.append(list(tokenizer.encode(text, add_special_tokens=special)))
    answers = generate_greedy(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens)
    chosen = [parse_answer(text, choices) for text, (_, choices, _) in zip(answers, items, strict=True)]
    return GenerationScores(
        parsed=np.array([c is not None for c in chosen], dtype=bool),
        correct=np.array([c == answer for c, (_, _, answer) in zip(chosen, items, strict=True)], dtype=bool),
    )


def generate_greedy(
    model: Any, tokenizer: Any, prompts: Sequence[list[int]], *, batch_tokens: int, max_new_tokens: int
) -> list[str]:
    """The likeliest continuations, token by token, of token-id prompts: see `generate`."""
    return generate(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens)
