"""`fedlm init`: write a commented recipe to start from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from fedlm.errors import RecipeError
from fedlm.models.processor import for_this_machine
from fedlm.recipe.starters import DEFAULT, pipelines, read_template, templates


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init")(init)


def _complete(incomplete: str) -> list[str]:
    return [name for name in {**templates(), **pipelines()} if name.startswith(incomplete)]


def init(
    template: Annotated[str, typer.Argument(help="Which recipe; see --list.", autocompletion=_complete)] = DEFAULT,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write it; - prints it.")] = Path("recipe.yaml"),
    list_: Annotated[bool, typer.Option("--list", help="List the templates.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a commented recipe to start from.

    \b
    Examples:
      fedlm init                       for your own files
      fedlm init --list                what else there is
      fedlm init news --out news.yaml  a demo that learns something on a laptop
      fedlm init pipeline --out pipeline.yaml  several stages, one after the other
    """
    if list_:
        found = {**templates(), **pipelines()}
        if as_json:
            typer.echo(json.dumps(found, indent=1))
            return
        width = max(map(len, found))
        for name, about in found.items():
            typer.echo(f"{name:<{width}}  {about}")
        return
    shipped = read_template(template)
    text = for_this_machine(shipped)
    if str(out) == "-":
        typer.echo(text, nl=False)
        return
    _write(out, text, force)
    if as_json:
        changed = {"model.dtype": "float32"} if text != shipped else {}
        typer.echo(json.dumps({"template": template, "path": str(out), "changed": changed}, indent=1))
        return
    typer.echo(f"Wrote {out} ({template}).")
    if text != shipped:
        typer.echo("Its dtype is float32: this processor has no bf16 instructions. The others must take the same file.")
    typer.echo(f"Next: fedlm {'pipeline' if template in pipelines() else 'recipe check'} {out}")


def _write(out: Path, text: str, force: bool) -> None:
    """Write beside and rename, so that an old recipe is never lost to a full disk. (`fedlm.files` would load torch.)"""
    if out.is_dir():
        raise RecipeError("this is a folder, --out names a file", where=str(out), fix=f"--out {out / 'recipe.yaml'}")
    if out.exists() and not out.is_file():
        raise RecipeError("this is a device or a pipe, --out names a file", where=str(out), fix="--out - prints it")
    if out.exists() and not force:
        raise RecipeError(
            "this file exists already", where=str(out), fix="choose another --out, or overwrite it with --force"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RecipeError(
            "this is no folder, so nothing can be written in it", where=str(out.parent), fix="choose another --out"
        ) from None
    target = out.resolve()  # a link stays a link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
