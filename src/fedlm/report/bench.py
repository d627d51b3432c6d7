"""The table of `fedlm bench algorithms` as a sortable page, as Markdown and as CSV: the same figures in all three."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm import __version__
from fedlm.files import write_atomic
from fedlm.report import plots
from fedlm.report.format import MISSING, count, duration, is_number, metric, number, plural, size
from fedlm.report.markup import asset, card, document, e, figure, table

Json = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column: its heading, what a row's cell says, and the number that it is sorted by."""

    head: str
    text: Callable[[Json], str]
    value: Callable[[Json], Any]


def write_bench(out: Path, outcome: Json) -> dict[str, Path]:
    """Write bench.html, bench.md and bench.csv into OUT; their paths by kind.

    Args:
        outcome: what bench.json holds.
    """
    texts = {"html": page(outcome), "md": markdown(outcome), "csv": as_csv(outcome)}
    paths = {kind: out / f"bench.{kind}" for kind in texts}
    for kind, text in texts.items():
        write_atomic(paths[kind], text.encode())
    return paths


def measured(outcome: Json) -> list[Json]:
    """The rows that have figures, in their order."""
    return [row for row in outcome["rows"] if "reason" not in row]


def columns(outcome: Json) -> list[Column]:
    """The table's columns for these results; those that no row has a figure for are left out."""
    several = len(outcome["settings"]["seeds"]) > 1
    reference = outcome["reference"]
    found = [
        Column("method", lambda r: str(r["name"]), lambda r: r["name"]),
        Column("group", lambda r: str(r["group"]), lambda r: r["group"]),
        Column("test loss" + (" [95 %]" if several else ""), _loss, _get("loss")),
        Column("perplexity", lambda r: number(r["perplexity"]), _get("perplexity")),
        Column("accuracy", lambda r: _interval("accuracy", r), _get("accuracy")),
        Column("accuracy, generated", lambda r: _interval("generation_accuracy", r), _get("generation_accuracy")),
        Column(f"loss against {reference}", _difference, _get("difference")),
        Column("worst silo's loss", lambda r: metric("loss", r["worst_loss"]), _get("worst_loss")),
        Column("loss on others' text", lambda r: metric("loss", r["others_loss"]), _get("others_loss")),
        Column("aggregation error, largest", _error("aggregation_error"), _get("aggregation_error")),
        Column("aggregation error, mean", _error("mean_error"), _get("mean_error")),
        Column("up per silo and round", lambda r: size(r["bytes_up"]), _get("bytes_up")),
        Column("down per silo and round", lambda r: size(r["bytes_down"]), _get("bytes_down")),
        Column("bytes in all", lambda r: size(r["bytes"]), _get("bytes")),
        Column(f"times fewer up than {reference}", lambda r: _times(r["fewer_up"]), _get("fewer_up")),
    ]
    for i, budget in enumerate(outcome["budgets"]):
        found.append(Column(f"loss at {size(budget)}", _at(i), lambda r, i=i: r["at_bytes"][i]))  # type: ignore[misc]
    found += [
        Column("learning rate", _rate, _get("rate")),
        Column("local steps", lambda r: count(r["steps"]), _get("steps")),
        Column("training time", lambda r: duration(r["seconds"]), _get("seconds")),
        Column("server time", lambda r: f"{1000 * r['server_seconds']:,.1f} ms", _get("server_seconds")),
        Column("peak memory", lambda r: size(r["peak_rss"]), _get("peak_rss")),
    ]
    rows = measured(outcome)
    return [c for c in found if any(c.value(row) is not None for row in rows)]


def _get(name: str) -> Callable[[Json], Any]:
    return lambda row: row.get(name)


def _loss(row: Json) -> str:
    return f"{row['loss']:.4f}" + _brackets(row["loss_interval"], 4)


def _difference(row: Json) -> str:
    if not is_number(row["difference"]):
        return MISSING
    return f"{row['difference']:+.4f}" + _brackets(row["difference_interval"], 4, sign="+")


def _interval(name: str, row: Json) -> str:
    interval = row.get(f"{name}_interval")
    text = metric(name, row.get(name))
    return text + (_brackets([100 * v for v in interval], 1) if interval else "")


def _brackets(interval: Sequence[float] | None, digits: int, sign: str = "") -> str:
    if interval is None:
        return ""
    low, high = (f"{value:{sign}.{digits}f}" for value in interval)
    return f" [{low}, {high}]"


def _error(name: str) -> Callable[[Json], str]:
    return lambda row: MISSING if row[name] is None else f"{row[name]:.1e}"


def _times(value: Any) -> str:
    return f"{value:.1f}x" if is_number(value) else MISSING


def _at(index: int) -> Callable[[Json], str]:
    def text(row: Json) -> str:
        loss = row["at_bytes"][index]
        return f"{loss:.4f}" + (" (base)" if loss == row["curve"][0][1] else "")

    return text


def _rate(row: Json) -> str:
    return number(row["rate"]) + (" (server)" if row["server_rate"] else "") + ("*" if row["at_edge"] else "")


# the three forms


def as_csv(outcome: Json) -> str:
    """One line per row; figures unrounded, intervals as two columns."""
    heads = [
        *("name", "method", "group", "rate", "at_edge", "loss", "loss_low", "loss_high", "perplexity"),
        *("accuracy", "accuracy_low", "accuracy_high", "difference", "difference_low", "difference_high"),
        *(
            "worst_loss",
            "others_loss",
            "aggregation_error",
            "mean_error",
            "bytes_up",
            "bytes_down",
            "bytes",
            "fewer_up",
        ),
        *(f"loss_at_{round(budget)}_bytes" for budget in outcome["budgets"]),
        *("steps", "seconds", "server_seconds", "wall_seconds", "peak_rss", "reason"),
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in outcome["rows"]:
        line = dict(row)
        for name in ("loss", "accuracy", "difference"):
            line[f"{name}_low"], line[f"{name}_high"] = row.get(f"{name}_interval") or (None, None)
        for budget, loss in zip(outcome["budgets"], row.get("at_bytes", []), strict=False):
            line[f"loss_at_{round(budget)}_bytes"] = loss
        writer.writerow(line)
    return text.getvalue()


def markdown(outcome: Json) -> str:
    """The table, what it says of published claims, and how to read it."""
    shown = columns(outcome)
    lines = [" | ".join(c.head for c in shown), " | ".join("---" if i < 2 else "---:" for i in range(len(shown)))]
    lines += [" | ".join(c.text(row) for c in shown) for row in measured(outcome)]
    parts = [_sentence(outcome), "\n".join(f"| {line} |" for line in lines), *_notes(outcome)]
    if missing := _missing(outcome):
        parts.append("Not in the table:")
        parts.append("\n".join(f"- {name}: {reason}" for name, reason in missing))
    judged = [c for c in outcome["claims"] if c["verdict"] != "not measured"]
    if judged:
        claims = [f"| {c['claim']} ({c['paper']}) | {c['verdict']} | {c['figures']} |" for c in judged]
        parts.append("| published claim | here | figures |\n| --- | --- | --- |\n" + "\n".join(claims))
    return "\n\n".join(parts) + "\n"


def page(outcome: Json) -> str:
    """The page: the plot of loss over bytes, the table that can be sorted, claims, and how to get it again."""
    rows = measured(outcome)
    best = min(rows, key=lambda r: r["loss"], default=None)
    cards = [card("rows", count(len(rows)), f"{count(len(outcome['rows']) - len(rows))} without a result")]
    if outcome["base"]:
        cards.append(card("base model's loss", f"{outcome['base']['loss']:.4f}"))
    if best is not None:
        cards.append(card("lowest loss", f"{best['loss']:.4f}", best["name"], main=True))
    judged = [[c["claim"], c["paper"], c["verdict"], c["figures"]] for c in outcome["claims"]]
    body = [
        f"<header><h1>{e(outcome['name'])} <span class='badge finished'>bench</span></h1>",
        f'<p class="lead">{e(_sentence(outcome))}</p></header>',
        f'<div class="cards">{"".join(cards)}</div>',
        figure(
            plots.loss_over_bytes(rows, outcome["frontier"], outcome["base"]),
            "Loss over bytes",
            "Each line is a method's rounds; the grey steps are the frontier: no method is better with fewer bytes.",
        ),
        "<h2>All methods</h2>",
        '<p class="note">Click a heading to sort. ' + e(" ".join(_notes(outcome))) + "</p>",
        _sortable(outcome, rows),
        "<h2>Published claims</h2>" + table(["claim", "paper", "here", "figures"], judged, text=4),
    ]
    if missing := _missing(outcome):
        body.append("<h2>Not in the table</h2>" + table(["row", "reason"], missing, text=2))
    asked = outcome["settings"]
    options = {"methods": [row["name"] for row in outcome["rows"]], "seeds": asked["seeds"]}
    options |= {"tuning-seeds": asked["tuning_seeds"], "lrs": [asked["rates"]]}
    command = "fedlm bench algorithms recipe.yaml"
    command += "".join(f" --{name} {','.join(map(str, values))}" for name, values in options.items())
    body.append(
        f"<h2>Reproduce</h2><pre>pip install fedlm=={e(__version__)}\n{e(command)}</pre>"
        f"<details><summary>recipe.yaml, as resolved</summary><pre>{e(outcome['recipe'])}</pre></details>"
    )
    return document(f"{outcome['name']} · fedlm bench", "".join(body), asset("sort.js"))


def _sortable(outcome: Json, rows: Iterable[Json]) -> str:
    shown = columns(outcome)
    kinds = [' class="text"' if i < 2 else "" for i in range(len(shown))]
    head = "".join(f"<th{k}>{e(c.head)}</th>" for c, k in zip(shown, kinds, strict=True))
    lines = []
    for row in rows:
        cells = []
        for column, kind in zip(shown, kinds, strict=True):
            value = column.value(row)
            data = "" if value is None else f' data-value="{e(value)}"'
            cells.append(f"<td{kind}{data}>{e(column.text(row))}</td>")
        lines.append(f'<tr title="{e(row["paper"])}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _sentence(outcome: Json) -> str:
    asked, tried = outcome["settings"], plural(outcome["settings"]["rates"], "learning rate")
    text = f"{plural(len(measured(outcome)), 'row')} on {plural(outcome['silos'], 'silo')}, "
    text += f"{plural(len(asked['seeds']), 'seed')} each, after choosing among {tried} on validation rows with "
    text += f"{plural(len(asked['tuning_seeds']), 'other seed')}."
    if outcome["base"]:
        text += f" The base model's test loss is {outcome['base']['loss']:.4f}."
    return text


def _notes(outcome: Json) -> list[str]:
    notes = [
        "Loss in nats per token on all silos' test rows after the last round; personal methods are measured with every "
        "silo's own model.",
        "Bytes are those of training alone, as the engine measured them; a set-up round's are in the sum, and not in "
        "those of a round.",
        "Training time is that of all silos' rounds one after the other, server time that of all server steps.",
        "Peak memory is that of the one process in which coordinator and silos work in turn.",
    ]
    if outcome["budgets"]:
        notes.append(
            "'Loss at' some bytes is that after the last round by which all silos together had sent and received at "
            "most these; '(base)' where not one round fits."
        )
    if any(row["at_edge"] for row in measured(outcome)):
        notes.append("A star marks a learning rate at an end of those tried.")
    if failed := [row["name"] for row in measured(outcome) if row["failed_rates"]]:
        notes.append(f"Some learning rates could not be trained with, for {', '.join(failed)}.")
    return notes


def _missing(outcome: Json) -> list[tuple[str, str]]:
    return [(row["name"], row["reason"]) for row in outcome["rows"] if "reason" in row]
