"""From the figures of all trainings to the table: means over seeds with intervals, at equal steps and at equal bytes.

*Equal steps*: every row is measured after its last round, when all have made the recipe's local steps (rows that need
others say so). *Equal bytes*: a row's loss at a budget of b bytes is that after its last round by which all silos
together had sent and received at most b; before its first round that is the base model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fedlm.evaluation.intervals import student_t
from fedlm.messages import Fields

REFERENCES = ("fedit", "fedavg")
"""The row that others are compared with: the first of these that is there, else the first row."""


def row_figures(by_seed: Mapping[int, Fields]) -> Fields:
    """One row's figures from its reporting seeds' (`Course.figures`).

    Returns:
        loss, loss_interval: mean over seeds, and its 95 % interval (Student's t; None for one seed); loss_by_seed.
        perplexity; accuracy and its interval where measured; worst_loss: mean over seeds of the worst silo's.
        others_loss: of every silo's model on other silos' rows, for personal methods.
        aggregation_error, mean_error: largest and mean over rounds and seeds; None where it is not defined.
        bytes_up, bytes_down: per silo and round, without set-up rounds; bytes: all of a training.
        steps, seconds, server_seconds, wall_seconds: of a training, means over seeds; peak_rss: the largest, bytes.
        curve: [[bytes so far, loss], ...], from before the first round.
    """
    seeds = sorted(by_seed)
    runs = [by_seed[seed] for seed in seeds]
    last = [run["points"][-1] for run in runs]
    losses = [point["loss"] for point in last]
    errors = [run for run in runs if run["aggregation_error"] is not None]
    figures: Fields = {
        "loss": fmean(losses),
        "loss_interval": _interval(losses),
        "loss_by_seed": dict(zip(map(str, seeds), losses, strict=True)),
        "perplexity": math.exp(min(fmean(losses), 700.0)),
        "worst_loss": fmean(point["fairness"]["loss"]["worst"] for point in last),
        "others_loss": fmean(run["others"]["loss"] for run in runs) if "others" in runs[0] else None,
        "aggregation_error": max((run["aggregation_error"] for run in errors), default=None),
        "mean_error": fmean(run["mean_error"] for run in errors) if errors else None,
        "bytes_up": fmean((run["bytes_up"] - run["setup_up"]) / run["trainings"] for run in runs),
        "bytes_down": fmean((run["bytes_down"] - run["setup_down"]) / run["trainings"] for run in runs),
        "bytes": fmean(run["bytes_up"] + run["bytes_down"] for run in runs),
        "steps": fmean(run["steps"] for run in runs),
        "peak_rss": max(run["peak_rss"] for run in runs),
        "curve": [
            [fmean(p["bytes"] for p in points), fmean(p["loss"] for p in points)]
            for points in zip(*(run["points"] for run in runs), strict=True)
        ],
    }
    for name in ("accuracy", "generation_accuracy"):
        if all(name in point for point in last):
            values = [point[name] for point in last]
            figures |= {name: fmean(values), f"{name}_interval": _interval(values)}
    for name in ("seconds", "server_seconds", "wall_seconds"):
        figures[name] = fmean(run[name] for run in runs)
    return figures


def compared(rows: Mapping[str, Fields], budgets: Sequence[float] | None = None) -> Fields:
    """What needs all rows: differences to the reference, bytes against it, losses at equal bytes.

    Args:
        rows: by name, what `row_figures` gave; "difference", "difference_interval" (paired by seed), "fewer_up" (times
            fewer bytes up than the reference), and "at_bytes" (losses at the budgets) are added to each.
        budgets: bytes of a whole training; by default a third of what the reference takes in all, and all of that.

    Returns:
        {"reference", "budgets", "frontier"}.
    """
    reference = next((name for name in REFERENCES if name in rows), next(iter(rows), None))
    if reference is None:
        return {"reference": None, "budgets": [], "frontier": []}
    whole = rows[reference]["bytes"]
    chosen = list(budgets) if budgets is not None else [whole / 3, whole]
    for name, row in rows.items():
        none = {"difference": None, "difference_interval": None}
        row |= none if name == reference else difference(row, rows[reference])
        row["fewer_up"] = rows[reference]["bytes_up"] / row["bytes_up"] if row["bytes_up"] else None
        row["at_bytes"] = [at_bytes(row["curve"], budget) for budget in chosen]
    return {"reference": reference, "budgets": chosen, "frontier": frontier(rows)}


def difference(row: Fields, other: Fields) -> Fields:
    """The row's loss minus the other's, paired by seed: they share first values, batches and partition."""
    seeds = sorted(row["loss_by_seed"].keys() & other["loss_by_seed"].keys(), key=int)
    paired = [row["loss_by_seed"][seed] - other["loss_by_seed"][seed] for seed in seeds]
    if not paired:
        return {"difference": None, "difference_interval": None}
    return {"difference": fmean(paired), "difference_interval": _interval(paired)}


def at_bytes(curve: Sequence[Sequence[float]], budget: float) -> float:
    """The loss after the last round that the budget pays for.

    >>> at_bytes([[0, 5.0], [100, 4.0], [200, 3.0]], 199.0)
    4.0
    """
    return float([loss for spent, loss in curve if spent <= budget * (1 + 1e-9)][-1])


def frontier(rows: Mapping[str, Fields]) -> list[list[Any]]:
    """Rounds of any row than which none has a lower loss with fewer bytes: [bytes, loss, row], by bytes."""
    points = sorted((spent, loss, name) for name, row in rows.items() for spent, loss in row["curve"][1:])
    best, found = math.inf, []
    for spent, loss, name in points:
        if loss < best:
            best = loss
            found.append([spent, loss, name])
    return found


def _interval(values: Sequence[float]) -> list[float] | None:
    return list(student_t(values)) if len(values) > 1 else None


def best_rate(tuned: Mapping[float, Sequence[float]]) -> tuple[float, bool]:
    """The learning rate of the lowest mean validation loss, and whether it is at an end of those tried.

    Args:
        tuned: by learning rate of which no training failed, the losses of the tuning seeds.
    """
    rate = min(tuned, key=lambda lr: (fmean(tuned[lr]), lr))
    return rate, rate in (min(tuned), max(tuned))


def base_figures(any_run: Mapping[str, Any]) -> Fields:
    """The base model on the same rows: what a training measures before its first round."""
    point = any_run["points"][0]
    found: Fields = {"loss": point["loss"], "worst_loss": point["fairness"]["loss"]["worst"]}
    found |= {"perplexity": math.exp(min(point["loss"], 700.0))}
    return found | {name: point[name] for name in ("accuracy", "generation_accuracy") if name in point}
