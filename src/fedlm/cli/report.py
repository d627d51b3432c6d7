"""`fedlm report`: write report.html of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.output import print_json


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="A run or pipeline directory.", show_default=False)],
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run's summary as JSON.")] = False,
) -> None:
    """Write report.html of a run or a pipeline, finished or not.

    \b
    Examples:
      fedlm report runs/news
      fedlm report runs/news --open
    """
    from fedlm.report.pipeline import is_pipeline, read_pipeline, sentence, write_pipeline_report

    if is_pipeline(run):
        page = write_pipeline_report(run)
        whole = read_pipeline(run)
        if as_json:
            print_json({"pipeline": whole.name, "status": whole.status, "measured": whole.cells, "report": str(page)})
        else:
            typer.echo(f"{sentence(whole)}\n\nWrote {page}")
        _show(page, open_)
        return
    from fedlm.report.facts import read_run
    from fedlm.report.html import write_report
    from fedlm.report.summary import summary_json, summary_lines
    from fedlm.report.words import verdict

    page = write_report(run)
    facts = read_run(run)
    if as_json:
        print_json({**summary_json(facts), "report": str(page), "verdict": verdict(facts)})
    else:
        typer.echo(verdict(facts))
        typer.echo()
        for line in summary_lines(facts):
            typer.echo(line)
        typer.echo()
        typer.echo(f"Wrote {page}")
    _show(page, open_)


def _show(page: Path, wanted: bool) -> None:
    if wanted:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
