"""`fedlm pipeline`: run the stages of a pipeline one after the other, each from the last one's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.output import print_json
from fedlm.errors import FedlmError, RunError

if TYPE_CHECKING:
    from fedlm.report.pipeline import PipelineFacts

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("pipeline")(pipeline)


def pipeline(
    file: Annotated[Path, typer.Argument(help="A pipeline (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="STAGE.A.B=C", help="Override one value of a stage's recipe; repeatable."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where to write; default runs/<name>.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the pipeline in --run-dir.")] = False,
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="Where silos are simulated: here, or over Ray.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="HOST:PORT", help="With ray: a running cluster.", show_default=False),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option("--network", metavar="KIT", help="The coordinator's kit of a network.", show_default=False),
    ] = None,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Run a pipeline: named stages, each from the final model of the one before it, and all of them compared.

    \b
    Examples:
      fedlm init pipeline --out pipeline.yaml
      fedlm pipeline pipeline.yaml
      fedlm pipeline pipeline.yaml --run-dir runs/life --resume
      fedlm pipeline pipeline.yaml --set instruct.federation.rounds=2
    """
    from fedlm.federation.engines.choose import Choice
    from fedlm.recipe.pipeline import load_pipeline, pipeline_name
    from fedlm.report.progress import Progress

    folder = run_dir or Path("runs") / pipeline_name(file)
    if resume and not (folder / "pipeline.json").is_file():
        raise RunError("there is no pipeline here to resume (pipeline.json is missing)", where=str(folder))
    where = Choice(engine, address, network)
    loaded = load_pipeline(file, folder, overrides or [])
    with Progress(silent=as_json) as progress:
        progress({"kind": "phase", "text": "loading"})
        from fedlm.comparison.pipeline import run_pipeline

        try:
            outcome = run_pipeline(loaded, folder, resume=resume, observe=progress, where=where)
        except (KeyboardInterrupt, FedlmError):
            if (folder / "pipeline.json").is_file():
                progress.warn(f"What was finished is kept. To continue: {_again(file, folder)}")
                _report(folder, no_report)
            raise
        page = _report(folder, no_report)
    if as_json:
        print_json({**outcome, "run_dir": str(folder), "report": str(page) if page else None})
    else:
        tell(folder, page)
        if outcome["status"] != "finished":
            typer.secho("Interrupted; every finished round is kept.", fg=typer.colors.YELLOW)
            typer.echo(f"continue       {_again(file, folder)}")
    if outcome["status"] != "finished":
        raise typer.Exit(INTERRUPTED)


def _again(file: Path, folder: Path) -> str:
    return f"fedlm pipeline {file} --run-dir {folder} --resume"


def _report(folder: Path, no_report: bool) -> Path | None:
    """Reports of the stages that have begun, and of the pipeline."""
    if no_report:
        return None
    from fedlm.report.html import write_report
    from fedlm.report.pipeline import read_pipeline, write_pipeline_report

    for stage in read_pipeline(folder).runs:
        write_report(folder / stage)
    return write_pipeline_report(folder)


def tell(folder: Path, page: Path | None) -> None:
    """The stages and what every model is worth, on standard output."""
    from fedlm.report.pipeline import STAGE_HEAD, read_pipeline, stage_rows
    from fedlm.report.summary import aligned

    facts = read_pipeline(folder)
    left = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]  # what is trained is long, and in the report
    for line in aligned([[row[i] for i in left] for row in [STAGE_HEAD, *stage_rows(facts)]]):
        typer.echo(line)
    for test in facts.cells:
        typer.echo()
        for line in aligned(cell_rows(facts, test)):
            typer.echo(line)
    typer.echo()
    typer.echo(f"run directory  {folder}")
    if page is not None:
        typer.echo(f"report         {page}")


def cell_rows(facts: PipelineFacts, test: str) -> list[list[str]]:
    """Every model on one stage's test rows."""
    from fedlm.report.format import metric, metric_name
    from fedlm.report.pipeline import BASE, cell_keys

    cells: dict[str, dict[str, Any]] = facts.cells[test]
    keys = cell_keys(cells)
    rows = [[m, *[metric(k, cells[m].get(k)) for k in keys]] for m in (BASE, *facts.recipes) if m in cells]
    return [[f"on test rows of {test}", *[metric_name(k) for k in keys]], *rows]
