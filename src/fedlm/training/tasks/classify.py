"""Classification: a head on the last token gives each class a logit; the loss is their cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedlm.errors import DataError
from fedlm.recipe.heads import labels_of
from fedlm.recipe.schema import Recipe
from fedlm.training.objective import Objective, sequences_of
from fedlm.training.scores import scores_of, sequence_scores, whole
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import Held, Measured, Task

LABEL = "label"
"""An example's class: its row of the head."""


class Classify(Task):
    """Which of the recipe's classes a row's question belongs to.

    The question is read as plain text, cut at `max_length` from its end, as transformers' text classification does. A
    silo may hold rows of one class alone; its head then learns nothing but that, and the average is what tells apart.
    """

    name = "classify"

    def __init__(self, recipe: Recipe | None = None) -> None:
        super().__init__(recipe)
        self.labels = labels_of(recipe) if recipe is not None else []

    def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
        right = class_of(row, self)
        found = whole(list(tokenizer(row["question"])["input_ids"]), tokenizer, max_length)
        return [Example((found,), {LABEL: float(right)})] if found else []

    def objective(self, tools: Any) -> Objective:
        return CrossEntropy(tools)

    def measure(self, held: Held) -> Measured:
        """See `judged`."""
        examples = self.held_examples(held)
        scores = scores_of(held.model, sequences_of(examples), held.batch_tokens, packing=held.packing)
        return judged(scores, labels_in(examples).numpy(), len(self.labels))


class CrossEntropy(Objective):
    """Mean over the step's rows of -log softmax(scores)_class."""

    rows = 0

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        self.rows = len(examples)
        return list(examples)

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        scores = self.scores(sequences_of(part))
        right = labels_in(part).to(scores.device)
        self.count("accuracy", float((scores.detach().argmax(1) == right).sum()), len(part))
        return cross_entropy(scores, right, reduction="none"), self.rows

    def scores(self, sequences: list[Encoded]) -> Tensor:
        """Of each class [sequences, classes], fp32."""
        return sequence_scores(self.tools.model, sequences, packing=self.tools.spec.packing)


def class_of(row: dict[str, Any], task: Any) -> int:
    """The number of a row's class among `task.labels`.

    Raises:
        DataError: it has none, or none of these.
    """
    if not row.get("choices"):
        raise DataError(f"the task '{task.name}' needs rows with question, choices and answer", where=row.get("row"))
    right = row["choices"][row["answer"]]
    if right not in task.labels:
        raise DataError(
            "the row's class is none of the run's", where=row.get("row"), fix="name all classes in classify.labels"
        )
    return int(task.labels.index(right))


def judged(scores: NDArray[np.float64], right: NDArray[np.int64], classes: int) -> Measured:
    """Loss, accuracy, and of each class k F1 = 2 hits / (rows of k + answers k) as 'label_f1/k'."""
    nll = cross_entropy(torch.from_numpy(scores), torch.from_numpy(right), reduction="none").numpy()
    answers = scores.argmax(1)
    hits = answers == right
    figures = {"loss": (float(nll.sum()), float(len(nll))), "accuracy": (float(hits.sum()), float(len(hits)))}
    for k in range(classes):
        both = int((right == k).sum() + (answers == k).sum())
        figures[f"label_f1/{k}"] = (2.0 * int((hits & (right == k)).sum()), float(both))
    items: dict[str, list[Any]] = {
        "nll": nll.tolist(),
        "tokens": np.ones(len(nll), int).tolist(),
        "choice": hits.astype(int).tolist(),
    }
    return Measured(figures, items)


def labels_in(examples: Sequence[Example]) -> Tensor:
    """The examples' classes, int64."""
    return torch.tensor([int(example.facts[LABEL]) for example in examples])
