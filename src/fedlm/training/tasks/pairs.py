"""Answers to one prompt: pairs of a chosen and a rejected one, and single ones with a verdict, as token sequences.

The prompt is rendered up to the opening of the assistant's turn and tokenized by itself, so that training sees the very
tokens that generation sees; targets are the answer's tokens and the token that ends the turn. An answer that is cut is
another answer, so a row that does not fit is refused rather than cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlm.errors import DataError
from fedlm.models.chat import FIX
from fedlm.randomness import key
from fedlm.training.sequences import Encoded
from fedlm.training.tasks.instruct import rendered, tokens_of

Messages = list[dict[str, str]]


def pair_of(row: dict[str, Any]) -> tuple[Messages, str, str]:
    """The turns before the answer, the chosen answer and the rejected one.

    A multiple-choice row gives the right option and one wrong one, drawn by a key of the row's content: the same in
    every run, whatever its seed, so that runs are measured on the same pairs.

    Raises:
        DataError: the row is no pair, or all its options are alike.
    """
    if row.get("chosen"):
        turns = [{"role": m["role"], "content": m["content"]} for m in row.get("messages") or []]
        return turns or [{"role": "user", "content": row["prompt"]}], row["chosen"], row["rejected"]
    if row.get("choices"):
        right = row["choices"][row["answer"]]
        others = [option for option in row["choices"] if option.split() != right.split()]
        if not others:
            raise DataError("every option of the row is the right one, so none can be rejected", where=row.get("row"))
        wrong = others[key(0, "rejected option", row["hash"]) % len(others)]
        return [{"role": "user", "content": row["question"]}], right, wrong
    raise DataError(
        "pairs come from rows with prompt, chosen and rejected, or question, choices and answer",
        where=row.get("row"),
        fix="map them in `columns`",
    )


def answered(tokenizer: Any, messages: Messages, answer: str, max_length: int, where: str | None) -> Encoded:
    """A prompt and an answer; targets are the answer's tokens.

    Raises:
        DataError: it is longer than `max_length`, or the template refuses it or renders the prompt differently with the
            answer behind it.
        ModelError: the chat template is missing or broken.
    """
    prompt = rendered(tokenizer, messages, True, where)
    whole = rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}], False, where)
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders the prompt differently with an answer behind it, so the answer's tokens cannot "
            "be told apart",
            where=where,
            fix=FIX,
        )
    before, after = tokens_of(tokenizer, prompt), tokens_of(tokenizer, whole[len(prompt) :])
    special = set(tokenizer.all_special_ids)
    last = max((i for i, token in enumerate(after) if token in special), default=len(after) - 1)
    ids = np.asarray(before + after[: last + 1], dtype=np.int32)
    if len(ids) > max_length:
        raise DataError(
            f"prompt and answer have {len(ids)} tokens, above `training.max_length` ({max_length}), and a cut answer "
            "is another answer",
            where=where,
            fix="raise `training.max_length`, or leave such rows out with data.malformed: skip",
        )
    return Encoded(ids, np.arange(len(ids)) >= max(len(before), 1))


def prompt_of(sequence: Encoded) -> Encoded:
    """The prompt of an answered one by itself, each of its tokens but the first a target."""
    ids = sequence.ids[: int(np.argmax(sequence.loss))]
    return Encoded(ids, np.arange(len(ids)) > 0)


def mismatched(prompt: Encoded, answer: Encoded, max_length: int) -> Encoded:
    """The first sequence's prompt with the second's answer, cut at `max_length`."""
    before, after = int(np.argmax(prompt.loss)), answer.ids[int(np.argmax(answer.loss)) :]
    ids = np.concatenate([prompt.ids[:before], after])[:max_length]
    return Encoded(ids, np.arange(len(ids)) >= before)
