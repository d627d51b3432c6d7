"""Classification by label words: of the words that name the classes, which one does the model itself go on with?"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fedlm.errors import DataError, ModelError
from fedlm.recipe.heads import labels_of
from fedlm.recipe.schema import Recipe
from fedlm.training.objective import Objective, Tools, sequences_of
from fedlm.training.scores import choice_logits, choices_of
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Held, Measured, Task
from fedlm.training.tasks.classify import LABEL, CrossEntropy, class_of, judged, labels_in
from fedlm.training.tasks.instruct import rendered, tokens_of


class LabelWords(Task):
    """Which of the recipe's classes a row's question belongs to, by the first token of each class's name as the answer
    in the model's chat template (a verbalizer: Schick and Schuetze, EACL 2021); the loss is the cross entropy of the
    right one among them.

    No parameter is added, so prompts can be trained by it: it is what FedBPT minimises (Sun et al., ICML 2024). Other
    tokens do not count: a model that says none of the words is not wrong for that.
    """

    name = "label-words"

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        self.labels = labels_of(recipe) if recipe is not None else []

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        where, right = row.get("row"), class_of(row, self)
        words = first_tokens(tokenizer, self.labels)
        ids = tokens_of(tokenizer, rendered(tokenizer, [{"role": "user", "content": row["question"]}], True, where))
        if len(ids) + 1 > max_length:
            raise DataError(
                f"the question has {len(ids)} tokens, and `training.max_length` is {max_length}",
                where=where,
                fix="raise `training.max_length`, or leave such rows out with data.malformed: skip",
            )
        whole = np.asarray([*ids, words[right]], np.int32)
        return [Example((Encoded(whole, np.arange(len(whole)) == len(whole) - 1),), {LABEL: float(right)})]

    def objective(self, tools: Tools) -> Objective:
        return WordLoss(tools, self.labels)

    def measure(self, held: Held) -> Measured:
        """See `judged`."""
        examples = self.held_examples(held)
        words = first_tokens(held.tokenizer, self.labels)
        scores = choices_of(held.model, sequences_of(examples), words, held.batch_tokens, packing=held.packing)
        return judged(scores, labels_in(examples).numpy(), len(self.labels))


class WordLoss(CrossEntropy):
    """Mean over the step's rows of -log P(right word | one of the words)."""

    def __init__(self, tools: Tools, labels: list[str]) -> None:
        super().__init__(tools)
        self.words = first_tokens(tools.tokenizer, labels)

    def scores(self, sequences: list[Encoded]) -> Tensor:
        return choice_logits(self.tools.model, sequences, self.words, packing=self.tools.spec.packing)


def first_tokens(tokenizer: Any, labels: list[str]) -> list[int]:
    """The first token of each label.

    Raises:
        ModelError: two labels begin alike.
    """
    found = [tokens_of(tokenizer, label)[0] for label in labels]
    for i, token in enumerate(found):
        if token in found[:i]:
            pair = f"'{labels[found.index(token)]}' and '{labels[i]}'"
            raise ModelError(
                f"the label words {pair} begin with the same token of this model",
                where="classify.labels",
                fix="name the classes by words that begin otherwise, or use task 'classify', which needs no words",
            )
    return found
