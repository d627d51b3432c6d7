"""`fedlm compare`: does federating help? Federated against each silo alone and all data in one place."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.output import print_json
from fedlm.errors import FedlmError, RunError

if TYPE_CHECKING:
    from rich.table import Table

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
                seeds=_seeds(seeds),
                budgets=_listed(budgets),
                silos=None if silos is None else _listed(silos),
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
    console.print(table_of(outcome["table"]))
    console.print("Every model was measured after its last round on the same held-out rows of all silos.", style="dim")
    console.print("Brackets: 95 % intervals. Costs are those of one training; time is summed over silos.", style="dim")
    console.print()
    console.print(outcome["verdict"]["sentence"], style="bold", soft_wrap=True)
    console.print()
    console.print(f"run directory   {folder}", soft_wrap=True)
    if page is not None:
        console.print(f"report          {page}", soft_wrap=True)
    console.print(f"took            {duration(outcome['seconds'])}")


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The comparison's rows as a table: kinds of arms, and silos one by one where they are few."""
    from rich.table import Table

    from fedlm.report.format import MISSING, count, duration, metric, size

    table = Table(box=None, header_style="bold", pad_edge=False)
    measured = [name for name in ("accuracy", "generation_accuracy", "loss") if any(name in row for row in rows)]
    headline = measured[0] if measured else "loss"
    heads = {"accuracy": "accuracy", "generation_accuracy": "generated", "loss": "loss"}
    table.add_column("arm", no_wrap=True)
    for name in measured:
        table.add_column(heads[name], justify="right", no_wrap=True)
    for head in ("perplexity", "worst silo", "steps", "moved", "time", "memory", "tokens/s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        if row["of"] is not None and sum(other["of"] == row["of"] for other in rows) > SILO_ROWS:
            continue
        moved = None if row["bytes_up"] is None else row["bytes_up"] + row["bytes_down"]
        trained = bool(row["steps"])
        table.add_row(
            ("  " if row["of"] else "") + row["arm"],
            *[_with_interval(name, row) for name in measured],
            metric("perplexity", row.get("perplexity")),
            metric(headline, row.get(f"worst_{headline}")),
            count(row["steps"]),
            size(moved) if trained else MISSING,
            duration(row["seconds"]) if trained else MISSING,
            size(row["peak_pss"]) if trained else MISSING,
            count(row["tokens_per_second"]) if trained else MISSING,
            style="bold" if row["kind"] == "federated" else "dim" if row["of"] else None,
        )
    return table


def _with_interval(name: str, row: dict[str, Any]) -> str:
    from fedlm.report.format import metric

    text, interval = metric(name, row.get(name)), row.get(f"{name}_interval")
    if not interval:
        return text
    if name == "loss":
        return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"
    return f"{text} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str | None) -> list[int] | None:
    """Raises:
    RunError: not whole numbers of at least 0.
    """
    if text is None:
        return None
    parts = _listed(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise RunError("seeds are whole numbers with commas between them", where="--seeds", fix="e.g. --seeds 0,1,2")
    return [int(part) for part in parts]
