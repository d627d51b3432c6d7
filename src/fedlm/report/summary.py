"""A run in a few lines for a terminal, or as JSON for a script."""

from __future__ import annotations

from typing import Any

from fedlm.report.facts import Json, RunFacts, metric_keys
from fedlm.report.format import duration, metric, metric_name, plural, size


def summary_json(facts: RunFacts) -> Json:
    """Status, held-out results before and after, and totals, without figures of single silos."""
    before, after, role = facts.before_after()
    return {
        "run": facts.run.get("run"),
        "run_dir": str(facts.folder),
        "status": facts.run.get("status"),
        "rounds_done": len(facts.rounds),
        "rounds_planned": facts.rounds_planned,
        "best_round": facts.run.get("best_round"),
        "held_out": {"rows": role, "base": _without_silos(before), "final": _without_silos(after)},
        "bytes_up": facts.total("bytes_up"),
        "bytes_down": facts.total("bytes_down"),
        "seconds": facts.total("seconds"),
        "peak_pss": facts.peak("peak_pss"),
        "failures": len(facts.failures()),
    }


def _without_silos(summary: Json) -> Json | None:
    return {k: v for k, v in summary.items() if k not in ("silos", "failures")} or None


def summary_lines(facts: RunFacts) -> list[str]:
    """A small table of what changed on held-out text, and one line of costs."""
    lines: list[str] = []
    groups = facts.groups()
    if groups:
        keys = metric_keys(group.row for group in groups)
        rows = [[g.name, *[_value(g.estimate(k), k) for k in keys]] for g in groups]
        lines += aligned([["on test rows", *[metric_name(k) for k in keys]], *rows])
    else:
        before, after, role = facts.before_after()
        keys = metric_keys([s for s in (before, after) if s])
        rows = [[metric_name(k), metric(k, before.get(k)), metric(k, after.get(k))] for k in keys]
        if rows:
            lines += aligned([[f"on {role} rows", "before", "after"], *rows])
    if facts.rounds:
        failures = len(facts.failures())
        parts = [
            plural(len(facts.rounds), "round"),
            duration(facts.total("seconds")),
            f"{size(facts.total('bytes_up'))} up, {size(facts.total('bytes_down'))} down",
            f"{size(facts.peak('peak_pss'))} peak memory",
            *([plural(failures, "failure")] if failures else []),
        ]
        lines += ["", " · ".join(parts)]
    return lines


def _value(found: Any, key: str) -> str:
    return metric(key, found.value if found else None)


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
