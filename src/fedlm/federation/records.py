"""What is written down of a round and of a run: who contributed, what it cost, how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.evaluation.summary import added
from fedlm.federation.folding import FoldResult
from fedlm.federation.rundir import RunDir
from fedlm.messages import Failure, Fields, Reply


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run: str
    path: Path
    status: str
    """'finished' or 'interrupted'."""
    rounds_done: int
    best_round: int | None
    best_loss: float | None
    evaluation: dict[str, Any] | None
    """Summaries on the silos' test rows: {"base": ..., "final": ...}."""
    cost: dict[str, float]
    """Over all rounds: bytes_up, bytes_down, seconds, tokens, steps, tokens_per_second (of a silo), peak_pss."""
    message: str = ""
    """What the user should know or do next."""


@dataclass
class Traffic:
    """Bytes of one round, validation included; up is from silos to the coordinator."""

    up: int = 0
    down: int = 0

    def add(self, reply: Reply) -> None:
        self.up += int(reply.fields.get("sent_bytes", 0))
        self.down += int(reply.fields.get("received_bytes", 0))


def training_loss(folded: FoldResult) -> float | None:
    """Mean training loss of the silos used, over its target tokens, pairs ...; None where none was."""
    if folded.loss is not None:
        return folded.loss
    fields = [folded.fields[name] for name in folded.replied]
    count = sum(f.get("loss_count", 0) for f in fields)  # silos may keep it to themselves
    return sum(f["loss"] * f["loss_count"] for f in fields) / count if count else None


def training_figures(folded: FoldResult) -> dict[str, float]:
    """The figures of a round's training, as means over all silos used."""
    figures = added(folded.fields[name].get("figures", {}) for name in folded.replied)
    return {name: total / count for name, (total, count) in figures.items() if count}


LINE = (
    "loss",
    "examples",
    "tokens",
    "target_tokens",
    "loss_count",
    "steps",
    "seconds",
    "tokens_per_second",
    "peak_rss",
    "dropped",
    "cut",
)
"""Figures of a silo's training that are written down; `loss` is a mean over `loss_count` target tokens, pairs ...;
`dropped` rows kept no target token, `cut` ones lost some."""

LEFT_OUT = "left_out"
"""Rows that the recipe's selection did without; only where it has one."""

RATES = ("flops_per_second", "mfu")
"""Model FLOPs per second of a silo's training and their share of its devices' peak; only where they are known (see
`fedlm.training.flops`)."""

PLANNED = "planned_steps"
"""The steps that a silo would have taken with more time; only where it took fewer."""


def silo_line(fields: Fields) -> dict[str, Any]:
    line = {name: fields[name] for name in (*LINE, *RATES, LEFT_OUT, PLANNED) if name in fields}
    if fields.get("figures"):
        line["figures"] = {name: total / count for name, (total, count) in fields["figures"].items() if count}
    return {**line, "bytes_up": fields.get("sent_bytes", 0), "bytes_down": fields.get("received_bytes", 0)}


def failure_lines(failures: Iterable[Failure]) -> list[dict[str, str]]:
    return [{"silo": f.silo, "kind": f.kind.value, "reason": f.reason} for f in failures]


def reasons(failures: Sequence[Failure], limit: int = 5) -> str:
    """Who failed and why; what several silos say alike is said once."""
    by_words: dict[str, list[str]] = {}
    for failure in failures:
        by_words.setdefault(f"{failure.kind.value}: {failure.reason}", []).append(failure.silo)
    lines = [f"{_some(silos, limit)}: {words}" for words, silos in by_words.items()]
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return ("; ".join(lines[:limit]) or "no silo answered") + more


def _some(silos: Sequence[str], limit: int) -> str:
    return ", ".join(silos[:limit]) + (f" and {len(silos) - limit} more" if len(silos) > limit else "")


def summarise_run(run_dir: RunDir, status: str, message: str, evaluation: dict[str, Any] | None) -> RunResult:
    """The result of a run from its directory, read one round at a time."""
    cost = {"bytes_up": 0.0, "bytes_down": 0.0, "seconds": 0.0, "tokens": 0.0, "steps": 0.0, "peak_pss": 0.0}
    meta = run_dir.meta
    training, best_loss, best = 0.0, None, meta["best_round"]
    for record in run_dir.iterate_rounds():
        for name in ("bytes_up", "bytes_down", "seconds"):
            cost[name] += record[name]
        cost["peak_pss"] = max(cost["peak_pss"], record["peak_pss"])
        for line in record["silos"].values():
            cost["tokens"] += line.get("tokens", 0)  # under masks silos do not tell
            cost["steps"] += line.get("steps", 0)
            training += line.get("seconds", 0.0)
        if record["round"] == best:
            best_loss = (record["validation"] or {}).get("loss")
    cost["tokens_per_second"] = cost["tokens"] / training if training else 0.0
    return RunResult(meta["run"], run_dir.path, status, meta["rounds_done"], best, best_loss, evaluation, cost, message)
