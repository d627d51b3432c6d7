"""What a recipe must know of each task, and what the figures mean that tasks count: data low in the import order."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TaskFacts:
    """Facts that decide which rows and settings a recipe may combine."""

    kinds: tuple[str, ...]
    """Kinds of rows that it learns from (see `fedlm.data.examples`)."""
    template: bool
    """It shows rows in the model's chat template."""
    loss: str = "nats per target token"
    """What its loss is measured in."""
    likelihood: bool = True
    """Its loss is the negative log-likelihood of text: perplexity, and all metrics of text, belong to it."""
    figures: tuple[str, ...] = ()
    """Of `FIGURES`, what it counts on held-out rows beside the loss."""
    one_per_row: bool = True
    """What a row gives is bounded: at most `sequences` sequences of `max_length` tokens."""
    sequences: int = 1
    selects: bool = False
    """Its rows are instruction and response, which `data.selection` judges."""
    head: Literal["none", "labels", "score", "predictor"] = "none"
    """What it puts on top of the model in place of the next token: a logit for each label, one number, or (the adapter
    of that kind) a predictor of preferences."""
    classes: bool = False
    """It tells classes apart that are the same for all rows: the sources' literal `choices`, or `classify.labels`."""


TASKS: dict[str, TaskFacts] = {
    "instruct": TaskFacts(("messages", "choice"), template=True, selects=True),
    "preference": TaskFacts(
        ("preference", "judged", "choice"),
        template=True,
        loss="preference loss per pair or judged answer",
        likelihood=False,
        figures=("reward_accuracy", "reward_margin"),
        sequences=4,
    ),
    "pretrain": TaskFacts(("text",), template=False, one_per_row=False),
    "classify": TaskFacts(
        ("choice",),
        template=False,
        loss="nats per row",
        likelihood=False,
        figures=("accuracy",),
        head="labels",
        classes=True,
    ),
    "label-words": TaskFacts(
        ("choice",), template=True, loss="nats per row", likelihood=False, figures=("accuracy",), classes=True
    ),
    "reinforce": TaskFacts(
        ("choice", "messages"), template=True, loss="minus the reward", likelihood=False, figures=("reward",)
    ),
    "reward": TaskFacts(
        ("preference", "choice"),
        template=True,
        loss="nats per pair",
        likelihood=False,
        figures=("reward_accuracy", "reward_margin"),
        sequences=2,
        head="score",
    ),
    "group-preference": TaskFacts(
        ("preference", "opinion", "choice"),
        template=True,
        loss="squared error per answer",
        likelihood=False,
        figures=("accuracy", "alignment"),
        head="predictor",
    ),
    "selector": TaskFacts(
        ("preference", "choice"),
        template=True,
        loss="nats per question",
        likelihood=False,
        figures=("accuracy", "consistency"),
        sequences=2,
    ),
}


@dataclass(frozen=True)
class Figure:
    """A mean over rows of all silos: a sum and a count, which add up."""

    words: str
    proportion: bool = False
    """A share of the rows, between 0 and 1; otherwise any number."""
    unit: bool = False
    """A mean of scores that each lie between 0 and 1; no share of rows, so its interval is not a binomial's."""
    higher: bool = True
    """More is better."""


FIGURES: dict[str, Figure] = {
    "exact_match": Figure("exact match", proportion=True),
    "f1": Figure("F1 of words", unit=True),
    "rougeL": Figure("ROUGE-L", unit=True),
    "rouge1": Figure("ROUGE-1", unit=True),
    "rouge2": Figure("ROUGE-2", unit=True),
    "loss": Figure("loss", higher=False),
    "skipped_steps": Figure("steps skipped as spikes", proportion=True, higher=False),
    "reward_accuracy": Figure("reward accuracy", proportion=True),
    "reward_margin": Figure("reward margin"),
    "reward": Figure("reward"),
    "flat_groups": Figure("flat groups", proportion=True, higher=False),
    "unfinished": Figure("unfinished answers", proportion=True, higher=False),
    "answer_tokens": Figure("answer tokens", higher=False),
    "ranking_accuracy": Figure("ranking accuracy", proportion=True),
    "kl": Figure("KL to reference", higher=False),
    "chosen_logp": Figure("log p chosen"),
    "rejected_logp": Figure("log p rejected", higher=False),
    "accuracy": Figure("accuracy", proportion=True),
    "alignment": Figure("alignment score", unit=True),
    "consistency": Figure("pairs judged alike in both orders", proportion=True),
    "label_f1": Figure("F1 of a label", unit=True),
    "macro_f1": Figure("macro F1", unit=True),
}

COUNTS = (
    "examples",
    "loss_tokens",
    "choice_correct",
    "choice_correct_norm",
    "choice_total",
    "generation_correct",
    "generation_parsed",
    "generation_total",
)
"""Whole numbers of a measurement on held-out rows, beside `loss_sum` and a sum and count for each figure."""

WRITTEN: dict[str, tuple[str, ...]] = {
    "exact_match": ("exact_match",),
    "f1": ("f1",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
}
"""Metrics of written answers, on rows of messages, and the figures that each counts."""

_NUMBERED = re.compile(r"(label_f1)/[0-9]{1,4}")


def figure_of(name: str) -> Figure | None:
    """What a figure of this name means; 'label_f1/3' is the fourth label's. None where there is no such figure."""
    match = _NUMBERED.fullmatch(name)
    return FIGURES.get(match[1] if match else name)
