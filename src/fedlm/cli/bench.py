"""`fedlm bench`: every algorithm on the same work, in one table."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedlm.cli.lists import listed, seeds_in
from fedlm.cli.output import print_json
from fedlm.errors import RunError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(
        rich_markup_mode=None, no_args_is_help=True, help="Every algorithm on the same work, in one table."
    )
    group.command("algorithms")(algorithms)
    group.command("rows")(show_rows)
    group.command("prepare")(prepare)
    app.add_typer(group, name="bench")


def prepare(
    out: Annotated[Path, typer.Option("--out", help="Folder for passages.jsonl and model/.")] = Path("recipes/small"),
    as_json: Json = False,
) -> None:
    """Make what recipes/small.yaml needs: passages by president, and a tiny Llama trained on others' (minutes, once).

    \b
    Example:
      fedlm bench prepare --out recipes/small
    """
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True, quiet=as_json), transient=True) as progress:
        task = progress.add_task("training the tiny model", total=None)
        from fedlm.comparison.bench.small import prepare as make

        made = make(out, lambda e: progress.update(task, total=e["steps"], completed=e["step"] + 1))
    if as_json:
        print_json(made)
        return
    typer.echo(f"{made['passages']:,} passages and a model of {made['parameters']:,} parameters are in {out}")


def algorithms(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML): data, model, local work.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; repeatable.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to write; default runs/<name>-bench-<time>.", show_default=False)
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Only these methods or rows, e.g. fedit,flora.", show_default=False)
    ] = None,
    groups: Annotated[
        str | None, typer.Option(help="Only these groups, e.g. lora,compression.", show_default=False)
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds that are reported.")] = "1,2,3",
    tuning_seeds: Annotated[str, typer.Option(help="Other seeds, that choose the learning rate.")] = "0",
    lrs: Annotated[int, typer.Option(min=1, help="Learning rates that are tried for each row.")] = 3,
    bytes_: Annotated[
        str | None, typer.Option("--bytes", help="Compare at these bytes, e.g. 1MB,20MB.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the bench in --out.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Trainings side by side.")] = None,
    as_json: Json = False,
) -> None:
    """Train every algorithm on the same work and write one table: quality, error, bytes, memory, seconds.

    Each row has the same tuning budget: its learning rate is chosen on validation rows with seeds of their own. All
    trainings share split and partition. Finished trainings are kept, so a bench goes on where it was stopped.

    \b
    Examples:
      fedlm bench prepare --out recipes/small
      fedlm bench algorithms recipes/small.yaml --out runs/small
      fedlm bench algorithms recipes/small.yaml --out runs/small --resume
      fedlm bench algorithms recipes/real.yaml --methods fedit,flora,fedsa-lora --seeds 1,2
    """
    from datetime import UTC, datetime

    from rich.console import Console

    from fedlm.comparison.bench.rows import choose
    from fedlm.recipe.load import load_recipe

    rows = choose(None if methods is None else listed(methods), None if groups is None else listed(groups))
    loaded = load_recipe(recipe, overrides or [])
    if resume and out is None:
        raise RunError("--resume goes on with the bench in --out", fix="name it: --out DIR --resume")
    folder = out or Path("runs") / f"{loaded.name}-bench-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    console = Console(stderr=True, quiet=as_json, highlight=False)
    from fedlm.comparison.bench.driver import Settings, bench
    from fedlm.report.bench import write_bench

    settings = Settings(seeds_in(seeds, "--seeds"), seeds_in(tuning_seeds, "--tuning-seeds"), lrs, _sizes(bytes_))
    with _Trainings(console) as trainings:
        try:
            outcome = bench(
                recipe,
                overrides or [],
                rows,
                settings,
                out=folder,
                observe=trainings,
                workers=workers,
                resume=resume,
                must=methods is not None,
            )
        except KeyboardInterrupt:
            if (folder / "data.json").is_file():
                again = f"fedlm bench algorithms {recipe} --out {folder} --resume"
                console.print(f"Finished trainings are kept. To continue, add --resume: {again}", style="yellow")
            raise
    paths = write_bench(folder, outcome)
    if as_json:
        print_json({**outcome, "files": {kind: str(path) for kind, path in paths.items()}})
    else:
        _tell(outcome, paths)
    failed = [row["name"] for row in outcome["rows"] if "reason" in row]
    if failed:
        reasons = "; ".join(f"{row['name']}: {row['reason']}" for row in outcome["rows"] if "reason" in row)
        raise RunError(f"{len(failed)} of {len(rows)} rows have no result: {reasons}", where=str(folder))


class _Trainings:
    """A line for each training that ends, and a bar of all of them on a terminal."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (TextColumn("trainings"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.console = console
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._began, self._ran = time.monotonic(), 0

    def __enter__(self) -> _Trainings:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        from rich.markup import escape

        from fedlm.report.format import duration

        if event["kind"] != "training_done":
            return
        left = ""
        if not event["stored"]:
            self._ran += 1
            per = (time.monotonic() - self._began) / self._ran
            ahead = event["total"] - event["done"]
            left = f"about {duration(per * ahead)} left" if ahead else ""
        self._bar.update(self._task, total=event["total"], completed=event["done"], description=left)
        if event["stored"]:
            return
        head = f"{event['done']:>4}/{event['total']}  {escape(event['arm']):<44}"
        if event["reason"]:
            self.console.print(f"{head} [red]failed[/red] {escape(event['reason'])}", soft_wrap=True)
        else:
            spent = f"{event['role']} loss {event['loss']:.4f}  {duration(event['seconds'])}"
            self.console.print(f"{head} {spent}  [dim]{left}[/dim]", soft_wrap=True)


def show_rows(as_json: Json = False) -> None:
    """List the rows: what --methods and --groups can name.

    \b
    Example:
      fedlm bench rows
    """
    from fedlm.comparison.bench.rows import all_rows

    rows = all_rows()
    if as_json:
        print_json([{"name": r.name, "method": r.method, "group": r.group, "paper": r.facts.paper} for r in rows])
        return
    width = max(len(row.name) for row in rows)
    for row in rows:
        typer.echo(f"{row.name:<{width}}  {row.group:<12}  {row.facts.paper}" + (f"; {row.note}" if row.note else ""))


def _tell(outcome: dict[str, Any], paths: dict[str, Path]) -> None:
    from rich.console import Console

    from fedlm.report.format import duration

    console = Console(highlight=False)
    if not console.is_terminal:  # a log has no width to fit into
        console = Console(highlight=False, width=200)
    console.print(_table(outcome))
    console.print()
    for claim in outcome["claims"]:
        if claim["verdict"] != "not measured":
            console.print(
                f"{claim['verdict']:<15} {claim['claim']} ({claim['paper']}): {claim['figures']}", soft_wrap=True
            )
    console.print()
    for kind, path in paths.items():
        console.print(f"{kind:<15} {path}", soft_wrap=True)
    console.print(f"took            {duration(outcome['seconds'])}")


def _table(outcome: dict[str, Any]) -> Table:
    """The columns that fit a screen; the files have them all."""
    from rich.table import Table

    from fedlm.report.bench import columns, measured

    wanted = ("method", "test loss", "loss against", "aggregation", "up per", "bytes in all", "learning", "peak")
    shown = [c for c in columns(outcome) if c.head.startswith(wanted)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(shown):
        table.add_column(column.head, justify="right" if i else "left", no_wrap=not i)
    for row in measured(outcome):
        table.add_row(*[column.text(row) for column in shown])
    return table


def _sizes(text: str | None) -> list[float] | None:
    """Raises:
    RunError: not sizes such as 1MB.
    """
    if text is None:
        return None
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    found = []
    for part in listed(text):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", part)
        if match is None or match[2].upper() not in units or not float(match[1]):
            raise RunError(f"'{part}' is no number of bytes", where="--bytes", fix="e.g. --bytes 500kB,20MB")
        found.append(float(match[1]) * units[match[2].upper()])
    return sorted(found)
