"""Reward models: a head gives a conversation one number, higher for the better of two answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedlm.errors import DataError
from fedlm.recipe.heads import RewardSpec
from fedlm.training.objective import Objective, Tools, sequences_of
from fedlm.training.scores import scores_of, sequence_scores, whole
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Held, Measured, Task
from fedlm.training.tasks.instruct import rendered, tokens_of
from fedlm.training.tasks.pairs import pair_of


class Reward(Task):
    """The Bradley-Terry model (Bradley and Terry, Biometrika 1952; as in Ouyang et al., NeurIPS 2022): answer c is
    preferred to answer r with probability sigmoid(R(c) - R(r)), and the loss is its negative logarithm.

    A conversation is read as the chat template writes it, to its end; one that is longer than `max_length` is refused,
    since an answer that is cut is another answer. Equal rewards count half towards the accuracy.
    """

    name = "reward"
    width = 2

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        messages, *answers = pair_of(row)
        where = row.get("row")
        return [Example(tuple(conversation(tokenizer, messages, text, max_length, where) for text in answers))]

    def objective(self, tools: Tools) -> Objective:
        return BradleyTerry(tools, self.recipe.reward if self.recipe is not None else RewardSpec())

    def measure(self, held: Held) -> Measured:
        """The loss, the share of pairs with the higher reward on the better answer, and the mean difference."""
        examples = self.held_examples(held)
        scores = scores_of(held.model, sequences_of(examples), held.batch_tokens, packing=held.packing)
        margins = scores[0::2, 0] - scores[1::2, 0]
        nll, hits = np.logaddexp(0.0, -margins), (margins > 0) + 0.5 * (margins == 0)
        count = float(len(margins))
        figures = {
            "loss": (float(nll.sum()), count),
            "reward_accuracy": (float(hits.sum()), count),
            "reward_margin": (float(margins.sum()), count),
        }
        items: dict[str, list[Any]] = {
            "nll": nll.tolist(),
            "tokens": np.ones(len(nll), int).tolist(),
            "reward": hits.tolist(),
        }
        return Measured(figures, items)


class BradleyTerry(Objective):
    """Mean over the step's pairs of -log sigmoid(R(c) - R(r)) + center (R(c) + R(r))^2."""

    pairs = 0

    def __init__(self, tools: Tools, spec: RewardSpec) -> None:
        super().__init__(tools)
        self.spec = spec

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        self.pairs = len(examples)
        return list(examples)

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        scores = sequence_scores(self.tools.model, sequences_of(part), packing=self.tools.spec.packing)[:, 0]
        better, worse = scores[0::2], scores[1::2]
        margin = better - worse
        gaps = margin.detach()
        self.count("reward_accuracy", float((gaps > 0).sum() + 0.5 * (gaps == 0).sum()), len(part))
        self.count("reward_margin", float(gaps.sum()), len(part))
        return -logsigmoid(margin) + self.spec.center * (better + worse).square(), self.pairs


def conversation(
    tokenizer: Any, messages: list[dict[str, str]], answer: str, max_length: int, where: str | None = None
) -> Encoded:
    """A conversation that ends with this answer, as the chat template writes it.

    Raises:
        DataError: it is longer than `max_length`, or the chat template refuses it.
        ModelError: there is no chat template, or it is broken.
    """
    text = rendered(tokenizer, [*messages, {"role": "assistant", "content": answer}], False, where)
    ids = tokens_of(tokenizer, text)
    found = whole(ids, tokenizer, max_length) if len(ids) <= max_length else None
    if found is None:
        raise DataError(
            f"prompt and answer have {len(ids)} tokens, above `training.max_length` ({max_length}), and a cut answer "
            "is another answer",
            where=where,
            fix="raise `training.max_length`, or leave such rows out with data.malformed: skip",
        )
    return found
