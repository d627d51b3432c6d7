"""report.html of a pipeline: its stages side by side, and every stage's model on the same test rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.files import read_json, write_atomic
from fedlm.report import plots
from fedlm.report.facts import Estimate, RunFacts, estimate, metric_keys, read_run
from fedlm.report.format import (
    METRICS,
    MISSING,
    count,
    duration,
    higher_is_better,
    metric,
    metric_name,
    plural,
    size,
)
from fedlm.report.html import with_interval
from fedlm.report.markup import card, document, e, figure, table
from fedlm.report.words import ALGORITHMS, model_name

BASE = "base"


@dataclass(frozen=True)
class PipelineFacts:
    """What a pipeline's directory says."""

    folder: Path
    name: str
    created: str
    fedlm: str
    recipes: dict[str, dict[str, Any]]
    """By stage, its recipe as resolved."""
    runs: dict[str, RunFacts]
    """By stage that has begun."""
    cells: dict[str, dict[str, dict[str, Any]]]
    """By stage whose test rows they are, and by model: the summary, or {"reason"}."""

    @property
    def status(self) -> str:
        """'finished' when every stage is; else that of the last one that has begun."""
        found = [str(run.run.get("status", "unknown")) for run in self.runs.values()]
        if len(found) == len(self.recipes) and set(found) == {"finished"}:
            return "finished"
        last = found[-1] if found else "not begun"
        return "interrupted" if last == "finished" else last

    def total(self, key: str) -> float | None:
        """Sum over all rounds of all stages."""
        values = [value for run in self.runs.values() if (value := run.total(key)) is not None]
        return sum(values) if values else None


def is_pipeline(folder: Path) -> bool:
    return (folder / "pipeline.json").is_file()


def read_pipeline(folder: Path) -> PipelineFacts:
    """Read a pipeline's directory, however much of it exists.

    Raises:
        RunError: there is no pipeline here, or one of its files is damaged.
    """
    try:
        known = read_json(folder / "pipeline.json")
        recipes = {str(stage["name"]): dict(stage["recipe"]) for stage in known["stages"]}
        file = folder / "measured.json"
        found = read_json(file)["cells"] if file.is_file() else {}
        cells = {stage: found[stage] for stage in recipes if stage in found}
        name, created, version = str(known["name"]), str(known["created"]), str(known["fedlm"])
    except FileNotFoundError:
        raise RunError("there is no pipeline here (pipeline.json is missing)", where=str(folder)) from None
    except (ValueError, KeyError, TypeError):
        raise RunError("pipeline.json or measured.json is damaged", where=str(folder)) from None
    runs = {stage: read_run(folder / stage) for stage in recipes if (folder / stage / "run.json").is_file()}
    return PipelineFacts(folder, name, created, version, recipes, runs, cells)


def write_pipeline_report(folder: Path) -> Path:
    """Write folder/report.html; returns its path. Raises as `read_pipeline`."""
    path = folder / "report.html"
    write_atomic(path, page(read_pipeline(folder)).encode())
    return path


def page(facts: PipelineFacts) -> str:
    """The whole page."""
    sections = [_header(facts), _cards(facts), _stages(facts), _same_rows(facts), _curves(facts), _lineage(facts)]
    sections.append(_reproduce(facts))
    return document(f"{facts.name} · fedlm pipeline", "".join(sections))


def sentence(facts: PipelineFacts) -> str:
    """What the pipeline does, in a sentence or two."""
    names = " → ".join(facts.recipes)
    first = next(iter(facts.recipes.values()))
    model = model_name(str((first.get("model") or {}).get("source", "a language model")))
    stages = plural(len(facts.recipes), "stage")
    return f"{stages} on {model}: {names}. Each starts from the final model of the one before it."


def stage_rows(facts: PipelineFacts) -> list[list[str]]:
    """A row per stage: name, task, what is trained, rounds, held-out metric, at its start and at its end, up, down,
    time, status."""
    rows = []
    for name, recipe in facts.recipes.items():
        run = facts.runs.get(name)
        row = [name, str(recipe.get("task")), _trained(recipe)]
        if run is None:
            rows.append([*row, *[MISSING] * 7, "not begun"])
            continue
        before, after, role = run.before_after()
        keys = metric_keys([before, after] if before and after else [])
        what = f"{metric_name(keys[0])}, {role}" if keys else MISSING
        change = [metric(keys[0], s.get(keys[0])) if keys else MISSING for s in (before, after)]
        done = f"{len(run.rounds)}" + (f" of {run.rounds_planned}" if run.rounds_planned else "")
        costs = [size(run.total("bytes_up")), size(run.total("bytes_down")), duration(run.total("seconds"))]
        rows.append([*row, done, what, *change, *costs, str(run.run.get("status"))])
    return rows


STAGE_HEAD = [
    "stage",
    "task",
    "trained",
    "rounds",
    "measured",
    "at its start",
    "at its end",
    "up",
    "down",
    "time of rounds",
    "status",
]


def _trained(recipe: dict[str, Any]) -> str:
    adapter, start = recipe.get("adapter") or {}, recipe.get("start") or {}
    kind = str(adapter.get("kind", "lora"))
    words = {"full": "all weights", "lora": f"LoRA, rank {adapter.get('rank')}", "ia3": "IA3"}.get(kind, kind)
    way = {"continue": ", continued", "stack": ", fresh on the last"}.get(str(start.get("adapter")), "")
    algorithm = str(((recipe.get("federation") or {}).get("algorithm") or {}).get("name", "fedavg"))
    return f"{words}{way}; {ALGORITHMS.get(algorithm, algorithm)}"


def cell_keys(cells: dict[str, dict[str, Any]]) -> list[str]:
    """The metrics that any model has on one stage's test rows, the most telling first."""
    return [key for key in METRICS if any(estimate(summary, key) for summary in cells.values())]


# the sections


def _header(facts: PipelineFacts) -> str:
    created = facts.created[:19].replace("T", " ")
    return (
        f'<header><h1>{e(facts.name)} <span class="badge {e(facts.status)}">{e(facts.status)}</span></h1>'
        f'<p>{e(created)} UTC</p><p class="lead">{e(sentence(facts))}</p></header>'
    )


def _cards(facts: PipelineFacts) -> str:
    done = sum(run.run.get("status") == "finished" for run in facts.runs.values())
    failures = sum(len(run.failures()) for run in facts.runs.values())
    peaks = [peak for run in facts.runs.values() if (peak := run.peak("peak_pss")) is not None]
    totals = [
        card("stages finished", f"{done} of {len(facts.recipes)}"),
        card("time of all rounds", duration(facts.total("seconds"))),
        card("sent by silos", size(facts.total("bytes_up"))),
        card("sent to silos", size(facts.total("bytes_down"))),
        card("peak memory", size(max(peaks, default=None)), "all processes of a run"),
        card("failures", count(failures)),
    ]
    changes = []
    for test, cells in facts.cells.items():
        base, last = cells.get(BASE, {}), next((cells[s] for s in reversed(facts.recipes) if s in cells), {})
        if keys := metric_keys([base, last]) if base and last else []:
            changes.append(_change(test, keys[0], estimate(base, keys[0]), estimate(last, keys[0])))
    main = f'<div class="cards">{"".join(changes)}</div>' if changes else ""
    return f'{main}<div class="cards small">{"".join(totals)}</div>'


def _change(test: str, key: str, before: Estimate | None, after: Estimate | None) -> str:
    assert before is not None and after is not None
    better = (after.value > before.value) == higher_is_better(key)
    note = "unchanged" if after.value == before.value else "better" if better else "worse"
    values = f"{metric(key, before.value)} → {metric(key, after.value)}"
    return card(f"{metric_name(key)}, test rows of {test}", values, f"base model → last stage: {note}", main=True)


def _stages(facts: PipelineFacts) -> str:
    links = " · ".join(
        f'<a href="{e(name)}/report.html">{e(name)}</a>'
        for name in facts.runs
        if (facts.folder / name / "report.html").is_file()
    )
    note = '<p class="note">Measured on held-out rows of the stage itself, by its own metric: figures of different '
    note += "tasks do not compare.</p>"
    own = f"<p>Each stage's own report: {links}</p>" if links else ""
    return f"<h2>The stages</h2>{note}{table(STAGE_HEAD, stage_rows(facts), text=3)}{own}"


def _same_rows(facts: PipelineFacts) -> str:
    parts = []
    for test, cells in facts.cells.items():
        keys = cell_keys(cells)
        rows = [
            [model, *[with_interval(key, estimate(cells[model], key), "\n") for key in keys]]
            for model in (BASE, *facts.recipes)
            if model in cells and "reason" not in cells[model]
        ]
        reasons = [f"{model}: {summary['reason']}" for model, summary in cells.items() if "reason" in summary]
        missing = "".join(f'<p class="note">Not measured: {e(reason)}</p>' for reason in reasons)
        heads = ["model after", *[metric_name(key) for key in keys]]
        rows_of = max((summary.get("examples", 0) for summary in cells.values()), default=0)
        title = f"<h3>Test rows of {e(test)}, {e(plural(int(rows_of), 'row'))}</h3>"
        bold = [row[0] == test for row in rows]
        parts.append(f"{title}{table(heads, rows, main=bold) if rows else ''}{missing}")
    if not parts:
        return ""
    chart = figure(_loss_by_model(facts), "Loss on the same test rows, stage by stage")
    note = '<p class="note">Every model on the same rows: what a stage adds, and what a later one loses again. '
    note += "The stage whose rows they are is bold.</p>"
    return f"<h2>Every model on the same rows</h2>{note}{chart}{''.join(parts)}"


def _loss_by_model(facts: PipelineFacts) -> plots.Figure | None:
    """A line for each test: the loss of the base and of each stage's model."""
    data: list[dict[str, Any]] = []
    for index, (test, cells) in enumerate(facts.cells.items()):
        found = [(model, estimate(cells.get(model, {}), "loss")) for model in (BASE, *facts.recipes)]
        points = [(model, loss.value) for model, loss in found if loss is not None]
        if points:
            x, y = [plots.safe(model) for model, _ in points], [value for _, value in points]
            style = {"color": plots.PALETTE[index % len(plots.PALETTE)], "width": 2}
            data.append({"type": "scatter", "mode": "lines+markers", "name": plots.safe(test), "x": x, "y": y})
            data[-1]["line"] = style
    axes = {"xaxis": {"title": {"text": "model after"}, "type": "category"}, "yaxis": {"title": {"text": "loss"}}}
    return {"data": data, "layout": {"height": 360, **axes}} if data else None


def _curves(facts: PipelineFacts) -> str:
    drawn = [
        figure(plots.losses(run), name, "Round 0 is the model it started from.") for name, run in facts.runs.items()
    ]
    drawn = [part for part in drawn if part]
    return f'<h2>How each stage learnt</h2><div class="pair">{"".join(drawn)}</div>' if drawn else ""


def _lineage(facts: PipelineFacts) -> str:
    rows = []
    for name, run in facts.runs.items():
        start, model = run.run.get("start") or {}, run.run.get("model") or {}
        source = model_name(str((facts.recipes[name].get("model") or {}).get("source", "?")))
        rows.append(
            [
                name,
                str(run.run.get("run", MISSING)),
                str(start.get("run", "the bare base")),
                str(start.get("adapter", MISSING)),
                str(start.get("sha256", MISSING))[:16],
                f"{source} {str(model.get('weights', ''))[:12]}",
            ]
        )
    heads = ["stage", "run", "starts from", "its adapter", "SHA-256 of the start", "base model, its SHA-256"]
    return f"<h2>Lineage</h2>{table(heads, rows, text=len(heads))}" if rows else ""


def _reproduce(facts: PipelineFacts) -> str:
    from fedlm.recipe.load import dump_recipe
    from fedlm.recipe.schema import Recipe

    shown = []
    for name, recipe in facts.recipes.items():
        text = dump_recipe(Recipe.model_validate(recipe))
        shown.append(f"<details><summary>{e(name)}: its recipe, as resolved</summary><pre>{e(text)}</pre></details>")
    command = f"pip install fedlm=={facts.fedlm}\nfedlm pipeline pipeline.yaml"
    return f"<h2>Reproduce</h2><pre>{e(command)}</pre>{''.join(shown)}"
