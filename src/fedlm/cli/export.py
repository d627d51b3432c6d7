"""`fedlm export`: a run's result for PEFT, or merged for any server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.models import Json
from fedlm.cli.output import print_json, warn_of_shared_part


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter into the weights.")] = False,
    dtype: Annotated[str, typer.Option(help="Of merged weights: float32 or bfloat16.")] = "float32",
    round_: Annotated[str, typer.Option("--round", help="best, last or a number.")] = "best",
    as_json: Json = False,
) -> None:
    """Export a run's adapter as a PEFT folder, or merged into a plain model folder.

    \b
    Examples:
      fedlm export runs/news --out news-adapter
      fedlm export runs/news --out news-model --merged
      fedlm export runs/news --out news-model --merged --dtype bfloat16 --round last
    """
    from fedlm.errors import ModelError, nearest
    from fedlm.inference.session import run_recipe, run_tensors
    from fedlm.models.export import check_empty, save_adapter, save_merged
    from fedlm.models.folders import DTYPES

    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{dtype}': {nearest(dtype, DTYPES)}", where="--dtype")
    if dtype != "float32" and not merged:
        raise ModelError(
            "--dtype only applies to --merged: adapters are always fp32", fix="add --merged or drop --dtype"
        )
    check_empty(out)
    recipe = run_recipe(run)
    tensors, name = run_tensors(run, round_)
    warn_of_shared_part(recipe.federation.algorithm.name)
    loss = 0.0
    if merged:
        loss = save_merged(out, tensors, recipe, dtype)
    else:
        save_adapter(out, tensors, recipe)
    if loss:
        typer.secho(
            f"Warning: rounding the merged weights to {dtype} changed them by {loss:.1%} of what the run had learned. "
            "Use --dtype float32, or the adapter itself, to keep all of it.",
            fg=typer.colors.YELLOW,
            err=True,
        )
    if as_json:
        print_json({"out": str(out), "merged": merged, "dtype": dtype, "from": name, "rounding_loss": loss})
    else:
        typer.echo(f"Wrote {'the merged model' if merged else 'the adapter'} of {name} to {out}.")
