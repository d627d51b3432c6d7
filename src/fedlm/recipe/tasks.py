"""What a recipe must know of each task, and what the figures mean that tasks count: data low in the import order."""

from __future__ import annotations

from dataclasses import dataclass


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
    """A row gives one example at most."""


TASKS: dict[str, TaskFacts] = {
    "instruct": TaskFacts(("messages", "choice"), template=True),
    "pretrain": TaskFacts(("text",), template=False, one_per_row=False),
}


@dataclass(frozen=True)
class Figure:
    """A mean over rows of all silos: a sum and a count, which add up."""

    words: str
    proportion: bool = False
    """A share of the rows, between 0 and 1; otherwise any number."""
    higher: bool = True
    """More is better."""


FIGURES: dict[str, Figure] = {
    "loss": Figure("loss", higher=False),
    "skipped_steps": Figure("steps skipped as spikes", proportion=True, higher=False),
}
