"""The report's figures as plain plotly JSON, {"data": [...], "layout": {...}}; the page sets its own colours and fonts.

A figure never grows with the number of silos: beyond `LINES` silos a line each becomes a median with the whole range,
beyond `BARS` silos a bar each becomes a histogram. Names come from data, so they are escaped: plotly reads some HTML.
"""

from __future__ import annotations

import html
import textwrap
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

from fedlm.report.facts import Group, RunFacts, estimate, fairness
from fedlm.report.format import is_number, is_share, metric_name

Figure = dict[str, Any]

LINES, BARS, LABELS = 16, 60, 9
PALETTE = ["#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#999999"]
"""Paul Tol's 'bright' scheme: seven colours that stay apart for colour-blind readers, on white and on black."""
DASHES = ["solid", "dot", "dash", "dashdot", "longdash"]
PATTERNS = ["", "/", ".", "x"]
ARM_COLOURS = {
    "base": "#999999",
    "alone": "#CCBB44",
    "alone-compute": "#EE6677",
    "federated": "#4477AA",
    "centralised": "#228833",
}


DARK_TEXT = {"#CCBB44", "#66CCEE", "#999999", "#EE6677"}
"""Colours too light for white text on them."""


def safe(name: object) -> str:
    """A name from data as text that plotly shows literally."""
    return html.escape(str(name), quote=False)


def _figure(data: list[Any], *, x: str = "", y: str = "", height: int = 360, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}
    for axis in axes:
        axes[axis] |= layout.pop(axis, {})
    return {"data": data, "layout": {"height": height, **axes, **layout}}


def _rounds_axis(facts: RunFacts) -> dict[str, Any]:
    last = max([int(line["round"]) + 1 for line in facts.rounds] or [1])
    return {"dtick": max(1, round(last / 10)), "tick0": 0, "rangemode": "tozero"}


def _line(name: str, x: list[Any], y: list[Any], index: int = 0, **more: Any) -> dict[str, Any]:
    style = {"color": PALETTE[index % len(PALETTE)], "dash": DASHES[index // len(PALETTE) % len(DASHES)], "width": 2}
    return {"type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "line": style, **more}


def comparison(groups: list[Group], key: str) -> Figure | None:
    """Bars of every kind of arm on the global test set, with intervals and one dot per silo trained alone."""
    names, values, above, below, colours, dots = [], [], [], [], [], []
    factor = 100 if is_share(key) else 1
    for group in groups:
        found = group.estimate(key)
        if found is None:
            continue
        label = "<br>".join(textwrap.wrap(group.name, 12))
        names.append(label)
        values.append(factor * found.value)
        known = found.low is not None and found.high is not None
        above.append(factor * (found.high - found.value) if known else None)  # type: ignore[operator]
        below.append(factor * (found.value - found.low) if known else None)  # type: ignore[operator]
        colours.append(ARM_COLOURS.get(group.key, "#AA3377"))
        if len(group.arms) > 1:
            dots += [(label, str(arm.get("arm")), estimate(arm.get("metrics") or {}, key)) for arm in group.arms]
    if not names:
        return None
    unit = " %" if factor == 100 else ""
    bars = {
        "type": "bar",
        "x": names,
        "y": values,
        "marker": {"color": colours},
        "error_y": {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": "ink"},
        "text": [f"{v:.1f}{unit}" if factor == 100 else f"{v:.3g}" for v in values],
        "textposition": "inside",
        "insidetextanchor": "start",
        "textfont": {"color": ["#000000" if c in DARK_TEXT else "#ffffff" for c in colours], "size": 14},
        "showlegend": False,
        "hovertemplate": "%{x}: %{y:.4g}" + unit + "<extra></extra>",
    }
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "one silo alone",
        "x": [d[0] for d in dots if d[2]],
        "y": [factor * d[2].value for d in dots if d[2]],
        "text": [safe(d[1].split(":", 1)[-1]) for d in dots if d[2]],
        "marker": {"size": 8, "color": "rgba(0,0,0,0)", "line": {"width": 1.5, "color": "ink"}},
        "hovertemplate": "%{text}: %{y:.4g}" + unit + "<extra></extra>",
    }
    return _figure(
        [bars, points] if dots else [bars],
        y=metric_name(key) + (" (%)" if unit else ""),
        yaxis={"rangemode": "tozero"},
        xaxis={"type": "category", "tickangle": 0},
        height=400,
    )


def losses(facts: RunFacts) -> Figure | None:
    """Mean training loss and validation loss per round; round 0 is the base model."""
    train = [(int(r["round"]) + 1, r["loss"]) for r in facts.rounds if is_number(r.get("loss"))]
    checked = [(0, facts.base_validation)] + [(int(r["round"]) + 1, r.get("validation") or {}) for r in facts.rounds]
    validation = [(x, e.value) for x, e in ((x, estimate(v, "loss")) for x, v in checked) if e is not None]
    if not train and not validation:
        return None
    data = []
    if train:
        data.append(_line("training (mean of silos)", [x for x, _ in train], [y for _, y in train], 1))
    if validation:
        data.append(_line("validation", [x for x, _ in validation], [y for _, y in validation], 0))
    best = facts.run.get("best_round")
    layout: dict[str, Any] = {}
    if is_number(best) and best >= 0:
        layout["shapes"] = [
            {"type": "line", "x0": best + 1, "x1": best + 1, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dot"}}
        ]
        note = {"x": best + 1, "yref": "paper", "y": 1, "yanchor": "top", "text": "best round "}
        note |= {"xanchor": "right", "showarrow": False}
        layout["annotations"] = [note]
    return _figure(data, x="round", y="loss (nats per token)", xaxis=_rounds_axis(facts), **layout)


def by_silo(
    facts: RunFacts, value: Callable[[dict[str, Any], str], Any], y: str, whole: list[tuple[int, float]] | None = None
) -> Figure | None:
    """A number per silo and round: a line each, or median and range where there are many silos.

    Args:
        value: (a round's line, a silo's name) -> the number, or anything else for none.
        y: the axis's title, with its unit.
        whole: the same number for the whole round, shown as a thick line.
    """
    series: dict[str, list[tuple[int, float]]] = {}
    for line in facts.rounds:
        names = set(line.get("silos") or {}) | set((line.get("validation") or {}).get("silos") or {})
        for name in names:
            number = value(line, name)
            if is_number(number):
                series.setdefault(name, []).append((int(line["round"]) + 1, float(number)))
    if not series:
        return None
    data: list[dict[str, Any]] = []
    if len(series) <= LINES:
        colour = {name: i for i, name in enumerate(facts.silos())}  # the same in every figure
        for name, points in sorted(series.items()):
            data.append(_line(safe(name), [x for x, _ in points], [v for _, v in points], colour.get(name, 0)))
    else:
        data += _band(series)
    if whole:
        thick = {"color": "ink", "width": 3}
        data.append(_line("whole round", [x for x, _ in whole], [v for _, v in whole], line=thick))
    return _figure(data, x="round", y=y, xaxis=_rounds_axis(facts))


def _band(series: dict[str, list[tuple[int, float]]]) -> list[dict[str, Any]]:
    rounds: dict[int, list[float]] = {}
    for points in series.values():
        for x, v in points:
            rounds.setdefault(x, []).append(v)
    at = sorted(rounds)
    edge = {"mode": "lines", "line": {"width": 0, "color": PALETTE[0]}, "hoverinfo": "skip"}
    low = _line("lowest silo", at, [min(rounds[i]) for i in at]) | edge | {"showlegend": False}
    high = _line("all silos", at, [max(rounds[i]) for i in at]) | edge
    high |= {"fill": "tonexty", "fillcolor": "rgba(68,119,170,0.25)"}
    return [low, high, _line("median silo", at, [median(rounds[i]) for i in at])]


def holdings(facts: RunFacts) -> Figure | None:
    """Who holds what: rows of each label in each silo; a histogram of sizes where there are many silos."""
    cards = facts.data.get("silos") or {}
    if not cards:
        return None
    if len(cards) > BARS:
        sizes = [sum((card.get("rows") or {}).values()) for card in cards.values()]
        bars = {"type": "histogram", "x": sizes, "marker": {"color": PALETTE[0]}, "showlegend": False}
        return _figure([bars], x="rows held by a silo", y="silos")
    totals: Counter[str] = Counter()
    for card in cards.values():
        totals.update({k: int(v) for k, v in (card.get("labels") or {}).items()})
    common = [label for label, _ in totals.most_common(LABELS)]
    rows = {name: dict(card.get("labels") or {}) for name, card in sorted(cards.items(), reverse=True)}
    parts = [(label, [int(held.get(label, 0)) for held in rows.values()]) for label in common]
    rest = [sum(int(v) for k, v in held.items() if k not in common) for held in rows.values()]
    if any(rest):
        parts.append((f"{len(totals) - len(common):,} other labels", rest))
    if not totals:
        parts = [("rows", [sum((cards[name].get("rows") or {}).values()) for name in rows])]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": safe(label) if label else "(no label)",
            "y": [safe(name) for name in rows],
            "x": counts,
            "marker": {
                "color": PALETTE[i % len(PALETTE)],
                "pattern": {"shape": PATTERNS[i // len(PALETTE)], "fillmode": "overlay", "fgcolor": "#fff"},
            },
        }
        for i, (label, counts) in enumerate(parts)
    ]
    height = 130 + 26 * len(rows)
    return _figure(data, x="rows", barmode="stack", yaxis={"type": "category"}, height=max(260, height))


def traffic(facts: RunFacts) -> Figure | None:
    """Bytes sent up and down since the start, in MB."""
    data = []
    for i, (key, name) in enumerate(
        (("bytes_up", "up: updates of the silos"), ("bytes_down", "down: the shared model"))
    ):
        points = [(int(r["round"]) + 1, r[key]) for r in facts.rounds if is_number(r.get(key))]
        total, sums = 0.0, []
        for _, moved in points:
            total += moved
            sums.append(total / 1e6)
        if points:
            data.append(_line(name, [x for x, _ in points], sums, i))
            data[-1]["line"]["dash"] = ["solid", "dash"][i]  # the two often coincide
    if not data:
        return None
    return _figure(data, x="round", y="MB since the start", xaxis=_rounds_axis(facts), yaxis={"rangemode": "tozero"})


def seconds(facts: RunFacts) -> Figure | None:
    """Seconds of local training per round and silo, beside the whole round's."""
    whole = [(int(r["round"]) + 1, float(r["seconds"])) for r in facts.rounds if is_number(r.get("seconds"))]
    figure = by_silo(facts, lambda line, name: _of(line, name, "seconds"), "seconds", whole)
    return figure and _from_zero(figure)


def speed(facts: RunFacts) -> Figure | None:
    """Tokens per second of local training, per round and silo."""
    figure = by_silo(facts, lambda line, name: _of(line, name, "tokens_per_second"), "tokens per second")
    return figure and _from_zero(figure)


def flops(facts: RunFacts) -> Figure | None:
    """Model FLOPs per second of local training, per round and silo."""
    figure = by_silo(facts, lambda line, name: _of(line, name, "flops_per_second"), "model FLOP per second")
    return figure and _from_zero(figure)


def utilisation(facts: RunFacts) -> Figure | None:
    """Their share of the peak of each silo's devices, where that is known."""
    figure = by_silo(facts, lambda line, name: _of(line, name, "mfu"), "share of the peak")
    return figure and _from_zero(figure)


def memory(facts: RunFacts) -> Figure | None:
    """Peak memory: of all the run's processes together, and of each silo's process."""
    whole = [(int(r["round"]) + 1, r["peak_pss"] / 1e6) for r in facts.rounds if is_number(r.get("peak_pss"))]

    def of_silo(line: dict[str, Any], name: str) -> Any:
        rss = _of(line, name, "peak_rss")
        return rss / 1e6 if is_number(rss) else None

    figure = by_silo(facts, of_silo, "MB", whole)
    if figure is None and whole:
        data = [_line("all processes of the run", [x for x, _ in whole], [v for _, v in whole])]
        figure = _figure(data, x="round", y="MB", xaxis=_rounds_axis(facts))
    elif figure is not None and whole:
        figure["data"][-1]["name"] = "all processes of the run"
    return figure and _from_zero(figure)


def aggregation_error(facts: RunFacts) -> Figure | None:
    """What silos load against the mean of what they trained, per round; a line for each of several ranks."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in facts.rounds:
        told = line.get("aggregation") or {}
        for rank, error in (told.get("error_by_rank") or {"": told.get("aggregation_error")}).items():
            if is_number(error):
                series.setdefault(str(rank), []).append((int(line["round"]) + 1, float(error)))
    data = [
        _line(f"rank {safe(rank)}" if rank else "error", [x for x, _ in points], [y for _, y in points], i)
        for i, (rank, points) in enumerate(sorted(series.items(), key=lambda item: item[0].zfill(6)))
    ]
    axis = {"type": "log", "exponentformat": "power"}
    return _figure(data, x="round", y="relative error", xaxis=_rounds_axis(facts), yaxis=axis) if data else None


def merged(facts: RunFacts) -> Figure | None:
    """Size of what a method has merged beside the frozen weights."""
    grown = [
        (int(r["round"]) + 1, ((r.get("aggregation") or {}).get("deltas") or {}).get("bytes")) for r in facts.rounds
    ]
    points = [(x, size / 1e6) for x, size in grown if is_number(size)]
    if not points:
        return None
    data = [_line("merged parts", [x for x, _ in points], [y for _, y in points])]
    return _from_zero(_figure(data, x="round", y="MB", xaxis=_rounds_axis(facts)))


def staleness(facts: RunFacts) -> Figure | None:
    """Answers of an asynchronous federation by the server steps that passed while they were made."""
    late = Counter(
        answer["staleness"]
        for line in facts.rounds
        for answer in line.get("arrivals") or []
        if answer.get("failure") is None and is_number(answer.get("staleness"))
    )
    if not late:
        return None
    at = sorted(late)
    bars = {"type": "bar", "x": at, "y": [late[i] for i in at], "marker": {"color": PALETTE[0]}, "showlegend": False}
    return _figure([bars], x="server steps since the model it started from", y="answers")


def silo_train_loss(facts: RunFacts) -> Figure | None:
    return by_silo(facts, lambda line, name: _of(line, name, "loss"), "training loss")


def silo_validation_loss(facts: RunFacts) -> Figure | None:
    def of_silo(line: dict[str, Any], name: str) -> Any:
        found = estimate(((line.get("validation") or {}).get("silos") or {}).get(name) or {}, "loss")
        return found.value if found else None

    return by_silo(facts, of_silo, "validation loss")


def fairness_bars(measured: dict[str, dict[str, Any]], key: str) -> Figure | None:
    """A metric of every silo in each of these summaries, by what they are of; a histogram where there are many silos.

    "after training" is among them.
    """
    found = {name: fairness(summary, key) for name, summary in measured.items()}
    after = found["after training"]
    if len(after) < 2:
        return None
    factor = 100 if is_share(key) else 1
    title = metric_name(key) + (" (%)" if factor == 100 else "")
    shown = list(zip(found.items(), (PALETTE[6], PALETTE[0], PALETTE[1]), strict=True))
    if len(after) > BARS:
        data = [
            {
                "type": "histogram",
                "name": name,
                "x": [factor * v for v in values.values()],
                "marker": {"color": colour},
                "opacity": 0.7,
            }
            for (name, values), colour in shown
            if values
        ]
        return _figure(data, x=title, y="silos", barmode="overlay")
    data = [
        {
            "type": "bar",
            "name": name,
            "x": [safe(n) for n in values],
            "y": [factor * v for v in values.values()],
            "marker": {"color": colour},
        }
        for (name, values), colour in shown
        if values
    ]
    return _figure(data, y=title, barmode="group", xaxis={"type": "category"}, yaxis={"rangemode": "tozero"})


def loss_over_bytes(rows: list[dict[str, Any]], front: list[Any], base: dict[str, Any] | None) -> Figure | None:
    """Each row's loss after its rounds over the bytes of all silos so far, and the frontier of all rows.

    Args:
        rows: of a bench, with "name", "group" and "curve".
        front: the frontier's [bytes, loss, name] each.
        base: the base model's figures, drawn as a level.
    """
    if not rows:
        return None
    groups = list(dict.fromkeys(row["group"] for row in rows))
    data: list[dict[str, Any]] = []
    for row in rows:
        index = groups.index(row["group"])
        number = sum(other["group"] == row["group"] for other in rows[: rows.index(row)])
        spent, losses = zip(*row["curve"][1:], strict=True)
        line = _line(safe(row["name"]), list(spent), list(losses), index)
        line["line"]["dash"] = DASHES[number % len(DASHES)]
        data.append({**line, "marker": {"symbol": number % 8, "size": 6}, "legendgroup": safe(row["group"])})
    steps = {"type": "scatter", "mode": "lines", "name": "frontier", "x": [p[0] for p in front], "opacity": 0.5}
    steps |= {"y": [p[1] for p in front], "line": {"shape": "hv", "width": 6, "color": "#999999"}}
    layout: dict[str, Any] = {}
    if base is not None:
        level = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base["loss"], "y1": base["loss"]}
        layout["shapes"] = [{**level, "line": {"dash": "dot"}}]
    axis = {"type": "log", "exponentformat": "SI"}
    title = "bytes up and down, all silos"
    return _figure([steps, *data], x=title, y="test loss (nats per token)", height=620, xaxis=axis, **layout)


def _of(line: dict[str, Any], silo: str, key: str) -> Any:
    return ((line.get("silos") or {}).get(silo) or {}).get(key)


def _from_zero(figure: Figure) -> Figure:
    figure["layout"]["yaxis"]["rangemode"] = "tozero"
    return figure
