"""`fedlm tokenizer`: one vocabulary for all silos, from counts of pairs instead of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.output import print_json


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Train a tokenizer on the silos' text.")
    group.callback()(_group)  # a single command would take the group's place
    group.command("train")(train)
    app.add_typer(group, name="tokenizer")


def _group() -> None:
    """Train a tokenizer on the silos' text."""


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML): its data and silos are used.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to write, for `model.tokenizer`.", show_default=False)],
    vocabulary: Annotated[int, typer.Option(help="Tokens, the 256 bytes and special tokens included.")] = 2048,
    at_least: Annotated[int, typer.Option(min=1, help="How often a pair must occur to be merged.")] = 2,
    chat_template: Annotated[
        str | None,
        typer.Option(help="'chatml' or a Jinja file; adds its special tokens, too.", show_default=False),
    ] = None,
    silo: Annotated[
        list[str] | None, typer.Option(help="A silo that takes part; repeatable; default: all.", show_default=False)
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(metavar="KIT", help="The coordinator's kit: silos are organisations.", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a byte-level BPE tokenizer: each silo counts pairs of neighbours, the coordinator merges.

    The result is that of training on all text in one place. No word travels, but exact counts do: an owner allows them
    with the verb 'pairs'. A call that was stopped goes on where it was when it is given again.

    \b
    Examples:
      fedlm tokenizer train recipe.yaml --out tokenizers/ours --vocabulary 2048
      fedlm tokenizer train recipe.yaml --out tokenizers/ours --vocabulary 8192 --chat-template chatml
      fedlm tokenizer train recipe.yaml --out tokenizers/ours --network kits/coordinator
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fedlm.messages import Event
    from fedlm.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as bar:
        task = bar.add_task("reading the data", total=None)
        from fedlm.federation.tokenizer import train_tokenizer

        def observe(event: Event) -> None:
            bar.update(task, description="new symbols", completed=event["done"], total=event["of"])

        done = train_tokenizer(
            loaded,
            out,
            vocabulary=vocabulary,
            at_least=at_least,
            chat_template=chat_template,
            base=recipe.parent,
            network=network,
            silos=silo,
            observe=observe,
        )
    value = {name: getattr(done, name) for name in ("tokens", "silos", "requests", "bytes_up", "bytes_down", "seconds")}
    if as_json:
        print_json({**value, "folder": str(out), "merges": len(done.merges)})
        return
    typer.echo(f"{done.tokens} tokens from {len(done.merges)} merges over {len(done.silos)} silos, in {out}")
    if done.tokens < vocabulary:
        typer.secho(
            f"Fewer than {vocabulary}: no other pair occurs {at_least} times.", fg=typer.colors.YELLOW, err=True
        )
    typer.echo(
        f"{done.requests} requests in {done.seconds:.0f} s, {done.bytes_up / 1e6:.1f} MB up and "
        f"{done.bytes_down / 1e6:.1f} MB down in all"
    )
    typer.echo(f"in a recipe: model: {{source: 'preset:llama-1m', tokenizer: {out}}}")
