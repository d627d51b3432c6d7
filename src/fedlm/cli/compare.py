"""`fedlm compare`: does federating help? Federated against each silo alone and all data in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.lists import listed, seeds_in
from fedlm.cli.output import print_json
from fedlm.errors import FedlmError, RunError
from fedlm.recipe.tasks import FIGURES, WRITTEN

if TYPE_CHECKING:
    from rich.table import Table

HEADS = {
    "accuracy": "accuracy",
    "generation_accuracy": "accuracy, generated",
    **{figure: FIGURES[figure].words for figures in WRITTEN.values() for figure in figures},
    "reward_accuracy": FIGURES["reward_accuracy"].words,
    "reward": FIGURES["reward"].words,
    "alignment": FIGURES["alignment"].words,
    "loss": "loss",
}

SILO_ROWS = 12
"""Silos that train alone are listed one by one up to this many."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compare")(compare)


def compare(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; repeatable.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", help="Where to write; default runs/<name>-compare-<time>.", show_default=False),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Repeat everything for these, e.g. 0,1,2; default: the recipe's.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Silos alone at equal 'steps' per silo, at equal total 'compute', or both.")
    ] = "steps,compute",
    silos: Annotated[
        str | None, typer.Option(help="Only these silos train alone, e.g. a,b; default: all.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --run-dir.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that --run-dir holds.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that train silos side by side.")] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json, and no progress.")] = False,
) -> None:
    """Compare the federation with each silo alone and with all data in one place, on the same held-out rows.

    \b
    Examples:
      fedlm compare recipe.yaml
      fedlm compare recipe.yaml --budgets steps --seeds 0,1,2
      fedlm compare recipe.yaml --run-dir runs/first --resume
    """
    from datetime import UTC, datetime

    from fedlm.recipe.load import load_recipe
    from fedlm.report.progress import Progress

    if resume and (run_dir is None or force):
        raise RunError(
            "--resume goes on with the comparison in --run-dir" + (", so --force does not apply" if force else ""),
            fix="name it: --run-dir RUN --resume",
        )
    loaded = load_recipe(recipe, overrides or [])
    folder = run_dir or Path("runs") / f"{loaded.name}-compare-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    if resume and not (folder / "run.json").is_file():
        raise RunError("there is no comparison here to resume (run.json is missing)", where=str(folder))
    with Progress(silent=as_json) as progress:
        progress({"kind": "phase", "text": "loading"})
        from fedlm.comparison import triple

        try:
            outcome = triple.compare(
                loaded,
                base=recipe.parent,
                run_dir=folder,
                observe=progress,
                seeds=None if seeds is None else seeds_in(seeds, "--seeds"),
                budgets=listed(budgets),
                silos=None if silos is None else listed(silos),
                workers=workers,
                resume=resume,
                force=force,
            )
        except (KeyboardInterrupt, FedlmError):
            if (folder / "run.json").is_file():
                again = f"fedlm compare {recipe} --run-dir {folder} --resume"
                progress.warn(f"Arms that were finished are kept. To continue: {again}")
            raise
        page = None
        if not no_report:
            from fedlm.report.html import write_report

            page = write_report(folder)
    if as_json:
        print_json({**outcome, "run_dir": str(folder), "report": str(page) if page else None})
        return
    tell(outcome, folder, page)


def tell(outcome: dict[str, Any], folder: Path, page: Path | None) -> None:
    """The table, the verdict and where things are, on standard output."""
    from rich.console import Console

    from fedlm.report.format import duration

    console = Console(highlight=False)
    if not console.is_terminal:  # a log has no width to fit into
        console = Console(highlight=False, width=160)
    for columns in (results_table(outcome["table"]), costs_table(outcome["table"])):
        console.print(columns)
        console.print()
    console.print(
        "Every model was measured after its last round, on the same held-out rows of all silos. 95 % intervals.\n"
        "Costs are those of one training; time is training time summed over silos; memory is that of all processes.",
        style="dim",
    )
    console.print()
    console.print(outcome["verdict"]["sentence"], style="bold", soft_wrap=True)
    console.print()
    console.print(f"run directory   {folder}", soft_wrap=True)
    if page is not None:
        console.print(f"report          {page}", soft_wrap=True)
    console.print(f"took            {duration(outcome['seconds'])}")


def results_table(rows: list[dict[str, Any]]) -> Table:
    """What each kind of arm reached, and each silo alone where they are few."""
    from rich.table import Table

    from fedlm.report.format import metric, number

    table = Table(box=None, header_style="bold", pad_edge=False)
    measured = [name for name in HEADS if any(name in row for row in rows)]
    table.add_column("how it was trained", no_wrap=True)
    for head in (*[HEADS[name] for name in measured], "perplexity", "worst silo"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in shown(rows):
        perplexity, worst = number(row.get("perplexity")), metric(measured[0], row.get(f"worst_{measured[0]}"))
        table.add_row(
            _label(row), *[_with_interval(name, row) for name in measured], perplexity, worst, style=_style(row)
        )
    return table


def costs_table(rows: list[dict[str, Any]]) -> Table:
    """What one training of each kind cost."""
    from rich.table import Table

    from fedlm.report.format import count, duration, size

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("what it cost", no_wrap=True)
    for head in ("steps", "tokens", "bytes up", "bytes down", "time", "memory", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in shown(rows):
        if row["steps"]:
            figures = [count(row["steps"]), count(row["tokens"]), size(row["bytes_up"]), size(row["bytes_down"])]
            figures += [duration(row["seconds"]), size(row["peak_pss"]), count(row["tokens_per_second"])]
            table.add_row(_label(row), *figures, style=_style(row))
    return table


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows but those of single silos where these are many."""
    return [r for r in rows if r["of"] is None or sum(other["of"] == r["of"] for other in rows) <= SILO_ROWS]


def _label(row: dict[str, Any]) -> str:
    return ("  " if row["of"] else "") + str(row["arm"])


def _style(row: dict[str, Any]) -> str | None:
    return "bold" if row["kind"] == "federated" else "dim" if row["of"] else None


def _with_interval(name: str, row: dict[str, Any]) -> str:
    from fedlm.report.format import metric

    text, interval = metric(name, row.get(name)), row.get(f"{name}_interval")
    if not interval:
        return text
    if name == "loss":
        return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
