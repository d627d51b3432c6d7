"""`fedlm audit`: what can be shown afterwards of what was asked and what left."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from fedlm.cli.audit_attack import attack, show_tried
from fedlm.cli.output import plain, print_json, print_table
from fedlm.errors import RunError

if TYPE_CHECKING:
    from fedlm.federation.silo.auditlog import Audit


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(cls=_Audit, rich_markup_mode=None, no_args_is_help=True)
    group.callback()(_group)
    group.command("run")(run)
    group.command("attack")(attack)
    group.command("log")(log)
    app.add_typer(group, name="audit")


class _Audit(TyperGroup):
    """`fedlm audit PATH` is `fedlm audit run PATH`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = not args or args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["run", *args])


def _group() -> None:
    """What left each silo of a run and what protected it; what a silo was asked and answered.

    \b
    Examples:
      fedlm audit runs/news
      fedlm audit news.yaml
      fedlm audit attack runs/news
      fedlm audit log hospital-a
    """


def run(
    path: Annotated[Path, typer.Argument(help="A run directory, or a recipe that was not run yet.")],
    attacks: Annotated[
        Path | None,
        typer.Option(
            help="What `fedlm audit attack` wrote; default: the run's own attacks.json.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show what leaves a silo, what protects it, which epsilon is spent, who is trusted, and which attacks were tried.

    Of a run directory it also writes audit.html there. `run` can be left out.

    \b
    Examples:
      fedlm audit runs/news
      fedlm audit news.yaml
    """
    from fedlm.report.audit import (
        TOKEN_HEAD,
        TOKEN_SUM,
        audit_of,
        meaning,
        sentence,
        spending,
        spent_by_token,
        write_audit,
    )

    found = audit_of(path, attacks)
    page = write_audit(path, found) if path.is_dir() else None
    if as_json:
        print_json({**found.as_json(), "page": None if page is None else str(page)})
        return
    typer.echo(sentence(found))
    print_table(["what leaves a silo", "when", "how"], [[i.what, i.when, i.protection] for i in found.leaving])
    if (guarantee := found.guarantee) is not None:
        typer.echo(f"{meaning(guarantee)}\nNoise: {guarantee.mechanism}.")
        if guarantee.spent:
            print_table(["whose rows", guarantee.counted, "epsilon spent", "budget"], spending(guarantee))
    if found.tokens:
        print_table(["silo", TOKEN_HEAD], spent_by_token(found))
        typer.echo(TOKEN_SUM)
    print_table(["who", "is trusted with"], [list(pair) for pair in found.trusted])
    typer.echo("Not protected:")
    for line in found.open_ends:
        typer.echo(f"- {line}")
    show_tried(found.tried)
    if page is not None:
        typer.echo(f"\nWrote {page}")


def log(
    file: Annotated[Path, typer.Argument(help="A silo's audit log, or its kit.", show_default=False)],
    head: Annotated[
        str | None, typer.Option(help="A head that this command printed before: that line must still be there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check a silo's audit log and show it: one line for each request, chained by hashes.

    Ends with code 1 where a line was changed, removed, inserted or moved. Lines that were cut off the end, or a log
    that was made anew as a whole, show only against a head that you noted elsewhere: give it with --head.

    Where the silo has drawn text anew (in_context.token_epsilon), it also says what that has cost, by its ledger.

    \b
    Examples:
      fedlm audit log hospital-a/state/hospital-a/_audit.jsonl
      fedlm audit log hospital-a --head 5f1c...
    """
    from fedlm.federation.silo.auditlog import read
    from fedlm.federation.silo.token_ledger import tokens_spent

    if head is not None and not re.fullmatch("[0-9a-f]{64}", head):
        raise RunError(
            "this is no head of a log", where="--head", fix="give the 64 hexadecimal digits that were printed"
        )
    path = log_of(file)
    found = read(path, head)
    if as_json:
        faults = [{"line": fault.line, "what": fault.what} for fault in found.faults]
        intact = {"intact": not faults, "faults": faults, "head": found.head, "unfinished": found.unfinished}
        spent = tokens_spent(path.parent)
        tokens = None if spent is None else asdict(spent)
        print_json({"file": str(path), **intact, "noise_on_text": tokens, "lines": found.lines})
    else:
        _show(found)
        for fault in found.faults:
            where = f"line {fault.line}: " if fault.line is not None else ""
            typer.secho(f"{where}{fault.what}", fg=typer.colors.RED, err=True)
        if found.unfinished:
            typer.echo(f"The last {found.unfinished} bytes are torn: the next line that is written will say so.")
        kind = "intact" if not found.faults else f"NOT INTACT: {len(found.faults)} faults"
        typer.echo(f"{len(found.lines)} lines, {kind}. Head: {found.head}")
        if head is None:
            typer.echo("Note the head elsewhere: only against it (--head) does a log that was cut at its end show.")
        if (spent := tokens_spent(path.parent)) is not None:
            typer.echo(
                f"Noise on text has cost a token an epsilon of {spent.epsilon:.4g} at most (draws: {spent.draws})."
            )
    if found.faults:
        raise typer.Exit(1)


def log_of(path: Path) -> Path:
    """The audit log that a path means: itself, or that of the silo whose kit it is.

    Raises:
        RunError: there is none.
        NetworkError: it is a folder, and no silo's kit.
    """
    if path.is_dir():
        from fedlm.federation.engines.flare.kit import read_kit
        from fedlm.federation.silo.auditlog import FILE

        kit = read_kit(path, "silo")
        path = kit.state / kit.name / FILE
    if not path.is_file():
        raise RunError("there is no audit log", where=str(path), fix="it begins with the first request to the silo")
    return path


def _show(found: Audit) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("#", "time", "verb", "run", "round", "try", "recipe", "in", "out", "outcome", "policy's line"):
        right = column in ("#", "round", "try", "in", "out")
        table.add_column(column, justify="right" if right else "left", no_wrap=column != "run", overflow="fold")
    for line in found.lines:
        table.add_row(*map(str, _row(line)))
    Console(markup=False, emoji=False, highlight=False).print(table)


def _row(line: dict[str, Any]) -> list[Any]:
    start = [line["seq"], line["time"][:19]]
    if line["kind"] == "request":
        sizes = [_size(line.get(way)) for way in ("in", "out")]
        who = [plain(str(line.get(name, ""))) for name in ("verb", "run", "round", "attempt")]
        end = [plain(str(line.get(name) or "")) for name in ("outcome", "line")]
        return [*start, *who, plain(str(line.get("recipe") or ""))[:10], *sizes, *end]
    told = {
        "torn": f"(torn before this line: {line.get('bytes')} bytes)",
        "pruned": f"({line.get('removed')} lines were pruned)",
        "checkpoint": f"(stands for {line.get('removed')} lines, SHA-256 {str(line.get('sha256'))[:10]})",
    }
    return [*start, line["kind"], plain(told[line["kind"]]), "", "", "", "", "", "", ""]


def _size(value: Any) -> str:
    number = value if type(value) is int else 0
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"
