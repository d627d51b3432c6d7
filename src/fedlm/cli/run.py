"""`fedlm run`: run the federation that a recipe describes, or resume one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.output import print_json
from fedlm.errors import FedlmError, RecipeError, RunError

if TYPE_CHECKING:
    from fedlm.federation.engines.choose import Choice
    from fedlm.federation.records import RunResult
    from fedlm.messages import Event, Observe
    from fedlm.recipe.schema import Recipe

INTERRUPTED = 130


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("run")(run)


def run(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML).", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; repeatable.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", help="Where to write; default runs/<name>-<time>.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="RUN", help="Continue this run.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that train silos side by side.")] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="local|ray", help="Where silos are simulated: here, or over Ray.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="With ray: a running cluster; default: start Ray.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            "--network",
            metavar="KIT",
            help="The coordinator's kit: silos are the organisations of this network.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run that --run-dir holds.")] = False,
    or_resume: Annotated[
        bool, typer.Option("--or-resume", help="Continue the run that --run-dir holds, if it has begun.")
    ] = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Serve /metrics (Prometheus) and /health here.", show_default=False),
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="The address that --metrics-port listens on.")] = "127.0.0.1",
    stalled_after: Annotated[
        float, typer.Option(min=1, help="Seconds without progress after which /health says stalled.")
    ] = 1800.0,
    json_logs: Annotated[
        bool, typer.Option("--json-logs", help="Log JSON lines instead of showing progress; also FEDLM_LOG=json.")
    ] = False,
) -> None:
    """Run the federation that a recipe describes, or resume one.

    \b
    Examples:
      fedlm run recipe.yaml
      fedlm run recipe.yaml --set federation.rounds=2 --set training.lr=1e-4
      fedlm run recipe.yaml --run-dir runs/first --workers 2
      fedlm run --resume runs/first
      fedlm run recipe.yaml --network kits/coordinator --run-dir runs/first --or-resume
      fedlm run recipe.yaml --engine ray --address head:6379 --run-dir /shared/first
    """
    from rich.console import Console

    from fedlm import logs
    from fedlm.federation.engines.choose import Choice
    from fedlm.report.eventlog import EventLog
    from fedlm.report.metrics import monitored
    from fedlm.report.progress import Progress

    if json_logs or logs.wanted():
        logs.configure(True, role="run")
    where = Choice(engine, address, network)
    if or_resume:
        if run_dir is None or force or resume is not None:
            raise RunError("--or-resume goes with --run-dir alone", fix="drop --resume and --force, and name --run-dir")
        if (run_dir / "run.json").is_file():
            resume, run_dir = run_dir, None
    changes = [*(overrides or []), *([f"federation.workers={workers}"] if workers else [])]
    chosen = _choose(recipe, changes, resume, run_dir, force)
    display = EventLog() if logs.as_json() else Progress(Console(stderr=True), silent=as_json)
    with monitored(metrics_port, metrics_host, stalled_after) as watch, display as progress:
        result, folder = _run(chosen, recipe, resume, run_dir, force, progress, not no_report, watch, where)
    _tell(result, folder, as_json, report=not no_report)
    if result.status == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _choose(
    path: Path | None, changes: list[str], resume: Path | None, run_dir: Path | None, force: bool
) -> Recipe | None:
    """The recipe to run; None to resume with the run's own.

    Raises:
        RecipeError: it cannot be read, is impossible, or is the name of a template.
        RunError: options that contradict each other, or no run to resume.
    """
    from fedlm.recipe.load import load_recipe

    if resume is not None:
        if run_dir is not None or force:
            option = "--run-dir" if run_dir is not None else "--force"
            raise RunError(f"--resume continues a run where it lies, {option} does not apply", fix=f"drop {option}")
        if not (resume / "run.json").is_file():
            raise RunError("there is no run here to resume (run.json is missing)", where=str(resume))
        if path is None and not changes:
            return None
        return load_recipe(path or resume / "recipe.yaml", changes)
    if path is None:
        raise RecipeError("there is no recipe to run", fix="name one: fedlm run recipe.yaml; `fedlm init` writes one")
    if (path / "run.json").is_file():
        raise RecipeError("this is a run, not a recipe", where=str(path), fix=f"continue it with --resume {path}")
    if not path.exists():
        _suggest_template(path)
    return load_recipe(path, changes)


def _suggest_template(path: Path) -> None:
    """Raise RecipeError where a path that isn't there looks like the name of a template."""
    import difflib

    from fedlm.recipe.starters import templates

    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    close = difflib.get_close_matches(stem, templates(), n=1, cutoff=0.7)
    if close and path.parent == Path():
        out = f"{close[0]}.yaml"
        raise RecipeError(
            f"there is no such file; '{close[0]}' is a template",
            where=str(path),
            fix=f"fedlm init {close[0]} --out {out}, then fedlm run {out}",
        )


def _run(
    chosen: Recipe | None,
    path: Path | None,
    resume: Path | None,
    run_dir: Path | None,
    force: bool,
    progress: Any,
    report: bool,
    watch: Observe,
    where: Choice,
) -> tuple[RunResult, Path]:
    """Run with everyone watching: the display, the metrics (`watch`) and the recipe's trackers."""
    progress({"kind": "phase", "text": "loading"})
    from fedlm.federation.api import run_recipe
    from fedlm.recipe.load import load_recipe
    from fedlm.report.trackers import Tracking, get_tracker

    recipe = chosen or load_recipe(_required(resume) / "recipe.yaml")
    facts = {"name": recipe.name, "recipe": recipe.model_dump(mode="json")}
    tracking = Tracking({name: get_tracker(name) for name in recipe.trackers}, facts, warn=progress.warn)
    started: list[Path] = []

    def observe(event: Event) -> None:
        if event.get("kind") == "run_started":
            started.append(Path(event["run_dir"]))
        progress(event)
        watch(event)
        tracking(event)

    try:
        result = run_recipe(
            chosen,
            base=path.parent if path is not None else None,
            run_dir=resume or run_dir,
            resume=resume is not None,
            force=force,
            observe=observe,
            engine=where.engine,
            address=where.address,
            network=where.network,
        )
    except BaseException as error:
        if started:
            _after_failure(error, started[0], progress, report)
        raise
    finally:
        tracking.finish()
    if report:
        progress({"kind": "phase", "text": "writing report.html"})
        from fedlm.report.html import write_report

        write_report(result.path)
    return result, result.path


def _after_failure(error: BaseException, folder: Path, progress: Any, report: bool) -> None:
    """Say how to go on, and leave a report of what was done; never hide the failure itself."""
    if not (folder / "rounds.jsonl").is_file():
        return
    if isinstance(error, FedlmError | KeyboardInterrupt):  # first: a second Ctrl-C must not lose it
        progress.warn(f"What was finished is kept. To continue: fedlm run --resume {folder}")
    if report:
        from fedlm.report.html import write_report

        try:
            write_report(folder)
        except (OSError, FedlmError) as second:
            progress.warn(f"report.html was not written: {second}")


def _required(path: Path | None) -> Path:
    if path is None:
        raise RecipeError("there is no recipe to run")
    return path


def _tell(result: RunResult, folder: Path, as_json: bool, *, report: bool) -> None:
    """What came out, and what to do next, on standard output."""
    from fedlm.recipe.tasks import TASKS
    from fedlm.report.facts import read_run
    from fedlm.report.summary import summary_json, summary_lines

    facts = read_run(folder)
    page = str(folder / "report.html") if report else None
    if as_json:
        value = summary_json(facts)
        print_json({**value, "status": result.status, "report": page, "message": result.message})
        return
    for line in summary_lines(facts):
        typer.echo(line)
    typer.echo()
    rows = [["run directory", str(folder)], *([["report", page]] if page else [])]
    if result.status == "interrupted":
        typer.secho("Interrupted; every finished round is kept.", fg=typer.colors.YELLOW)
        rows.append(["continue", f"fedlm run --resume {folder}"])
    else:
        if result.message:
            typer.echo(result.message[:1].upper() + result.message[1:] + ".")
        if TASKS[str(facts.recipe.get("task", "instruct"))].head == "none":
            rows.append(["talk to it", f"fedlm chat {folder}"])
        rows.append(["take it along", f"fedlm export {folder} --out ADAPTER"])
    for name, what in rows:
        typer.echo(f"{name:<15}{what}")
