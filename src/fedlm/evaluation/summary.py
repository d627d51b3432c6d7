"""From the counts of many silos to one result: global figures and how evenly they are spread over silos."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedlm.evaluation.intervals import wilson
from fedlm.messages import Fields
from fedlm.recipe.tasks import COUNTS, FIGURES, figure_of


def summarise(measured: Mapping[str, Mapping[str, Any]]) -> Fields:
    """Summarise `measure` results by silo name; figures that were not measured are left out.

    Returns (plain JSON):
        examples; loss (nats per target token over all silos, so silos weigh by their tokens); loss_tokens;
        perplexity (null above e^700);
        accuracy, accuracy_norm (multiple choice over all items) and generation_accuracy, each with "<name>_interval"
        (Wilson, 95 %) and its "<name>_total"; parse_rate;
        every figure that a task counts (`fedlm.recipe.tasks.FIGURES`) by its name, with "<name>_total", and of
        proportions "<name>_interval"; a task's own loss is such a figure, and has no perplexity; of F1 by label only
        "macro_f1", the mean over the labels that occur, in the rows or in the answers;
        fairness: for loss and each accuracy {"mean", "worst", "variance"} over the silos that have such items, every
        silo counting the same (population variance; worst is the highest loss or the lowest accuracy, "worst_silo"
        its name);
        silos: {name: {"examples", "loss", "loss_tokens", "perplexity", "accuracy", ...}}.
    """
    silos = {name: _figures(counts) for name, counts in sorted(measured.items())}
    total = {
        field: sum(counts.get(field, 0) for _, counts in sorted(measured.items())) for field in (*COUNTS, "loss_sum")
    }
    total["figures"] = added(counts.get("figures", {}) for _, counts in sorted(measured.items()))
    result = _figures(total)
    for figure, (positive, count) in total["figures"].items():
        known = figure_of(figure)
        if known is not None and known.proportion and count:
            result[f"{figure}_interval"] = list(wilson(round(positive), round(count)))
    for figure, correct, count in _ACCURACIES:
        if total[count]:
            result[f"{figure}_interval"] = list(wilson(total[correct], total[count]))
    result["fairness"] = {
        figure: spread
        for figure in dict.fromkeys(("loss", "accuracy", "accuracy_norm", "generation_accuracy", *FIGURES))
        if (spread := _spread(silos, figure)) is not None
    }
    result["silos"] = silos
    return result


_ACCURACIES = (
    ("accuracy", "choice_correct", "choice_total"),
    ("accuracy_norm", "choice_correct_norm", "choice_total"),
    ("generation_accuracy", "generation_correct", "generation_total"),
)


def perplexity(loss: float) -> float | None:
    """e^loss, or None where that leaves the range of floats."""
    return math.exp(loss) if loss <= 700 else None


def _figures(counts: Mapping[str, Any]) -> Fields:
    figures: Fields = {"examples": counts.get("examples", 0)}
    if counts.get("loss_tokens"):
        figures["loss"] = counts["loss_sum"] / counts["loss_tokens"]
        figures["loss_tokens"] = counts["loss_tokens"]
        figures["perplexity"] = perplexity(figures["loss"])
    for figure, correct, total in _ACCURACIES:
        if counts.get(total):
            figures[figure] = counts[correct] / counts[total]
            figures[f"{figure}_total"] = counts[total]
    if counts.get("generation_total"):
        figures["parse_rate"] = counts["generation_parsed"] / counts["generation_total"]
    by_label: list[float] = []
    for figure, (positive, count) in counts.get("figures", {}).items():
        if not count:
            continue
        if figure.startswith("label_f1/"):
            by_label.append(positive / count)
            continue
        figures[figure] = positive / count
        figures[f"{figure}_total"] = count
    if by_label:
        figures["macro_f1"] = sum(by_label) / len(by_label)
    return figures


def added(parts: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, tuple[float, float]]:
    """Figures of many silos, (sum, count) by name, added up."""
    both: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, (total, count) in part.items():
            before = both.get(name, (0.0, 0.0))
            both[name] = (before[0] + total, before[1] + count)
    return both


def _spread(silos: Mapping[str, Fields], figure: str) -> Fields | None:
    values = {name: figures[figure] for name, figures in silos.items() if figure in figures}
    if not values:
        return None
    mean = sum(values.values()) / len(values)
    worst = (max if figure in FIGURES and not FIGURES[figure].higher else min)(values, key=lambda name: values[name])
    return {
        "mean": mean,
        "worst": values[worst],
        "worst_silo": worst,
        "variance": sum((v - mean) ** 2 for v in values.values()) / len(values),
    }
