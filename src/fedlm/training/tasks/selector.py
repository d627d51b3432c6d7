"""Binary selectors: the model itself says which of two answers is better, as the letter A or B."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlm.errors import DataError, ModelError
from fedlm.training.forward import model_device
from fedlm.training.objective import Objective, Tools, sequences_of
from fedlm.training.scores import choice_logits, choices_of
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Held, Measured, Task
from fedlm.training.tasks.instruct import rendered, tokens_of
from fedlm.training.tasks.pairs import Messages, pair_of

LETTERS = ("A", "B")
QUESTION = "{asked}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nWhich answer is better, A or B?"


class Selector(Task):
    """Which answer is better, A or B? The loss is the cross entropy of the right letter among the two (Wu et al.,
    ICLR 2025). With the algorithm fedavg this is their FedBis; with fedbiscuit there are several selectors, which vote.

    Every pair is asked twice, once in each order, so that a letter is right as often as the other, in every silo. Held
    out, the answer is preferred that has the higher sum of both log-odds.
    """

    name = "selector"

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        messages, better, worse = pair_of(row)
        where = row.get("row")
        return [
            Example((asked(tokenizer, messages, pair, max_length, where, right),), {"right": float(right)})
            for right, pair in enumerate(((better, worse), (worse, better)))
        ]

    def objective(self, tools: Tools) -> Objective:
        return LetterLoss(tools)

    def measure(self, held: Held) -> Measured:
        """Per pair: the loss in both orders, whether the better answer is preferred, and whether by both orders."""
        examples = self.held_examples(held)
        letters = letter_tokens(held.tokenizer)
        logits = choices_of(held.model, sequences_of(examples), letters, held.batch_tokens, packing=held.packing)
        right = rights(examples).numpy()
        gaps = logits[np.arange(len(right)), right] - logits[np.arange(len(right)), 1 - right]
        nll, both = np.logaddexp(0.0, -gaps).reshape(-1, 2).mean(1), gaps.reshape(-1, 2)
        hits = (both.sum(1) > 0) + 0.5 * (both.sum(1) == 0)
        alike = (both[:, 0] > 0) == (both[:, 1] > 0)
        count = float(len(both))
        figures = {
            "loss": (float(nll.sum()), count),
            "accuracy": (float(hits.sum()), count),
            "consistency": (float(alike.sum()), count),
        }
        items: dict[str, list[Any]] = {
            "nll": nll.tolist(),
            "tokens": np.ones(len(nll), int).tolist(),
            "choice": hits.tolist(),
        }
        return Measured(figures, items)


class LetterLoss(Objective):
    """Mean over the step's questions of -log P(right letter | A or B)."""

    questions = 0

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        self.questions = len(examples)
        return list(examples)

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        model, packing = self.tools.model, self.tools.spec.packing
        logits = choice_logits(model, sequences_of(part), letter_tokens(self.tools.tokenizer), packing=packing)
        right = rights(part).to(model_device(model))
        self.count("accuracy", float((logits.detach().argmax(1) == right).sum()), len(part))
        return cross_entropy(logits, right, reduction="none"), self.questions


def asked(
    tokenizer: Any, messages: Messages, pair: tuple[str, str], max_length: int, where: str | None, right: int = 0
) -> Encoded:
    """The question which of two answers is better, up to the letter, which is the only target.

    Raises:
        DataError: it is longer than `max_length`, or the chat template refuses it.
        ModelError: there is no chat template, or the letters are no single tokens.
    """
    turns = "\n".join(m["content"] if len(messages) == 1 else f"{m['role']}: {m['content']}" for m in messages)
    question = QUESTION.format(asked=turns, first=pair[0], second=pair[1])
    ids = tokens_of(tokenizer, rendered(tokenizer, [{"role": "user", "content": question}], True, where))
    if len(ids) + 1 > max_length:
        raise DataError(
            f"the prompt with both answers has {len(ids)} tokens, and `training.max_length` is {max_length}",
            where=where,
            fix="raise `training.max_length`, or leave such rows out with data.malformed: skip",
        )
    whole = np.asarray([*ids, letter_tokens(tokenizer)[right]], np.int32)
    return Encoded(whole, np.arange(len(whole)) == len(whole) - 1)


def letter_tokens(tokenizer: Any) -> list[int]:
    """The tokens of A and B. Raises ModelError where they are more than one each."""
    found = [tokens_of(tokenizer, letter) for letter in LETTERS]
    if any(len(ids) != 1 for ids in found):
        raise ModelError("this tokenizer has no single tokens for the letters A and B", where="model.source")
    return [ids[0] for ids in found]


def rights(examples: Sequence[Example]) -> Tensor:
    """The right letters' numbers, int64."""
    return torch.tensor([int(example.facts["right"]) for example in examples])
