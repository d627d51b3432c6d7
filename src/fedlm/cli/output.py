"""What commands print for scripts: one JSON value on stdout, nothing else."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print one JSON value; NaN and infinities are refused, since JSON has none."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))


def plain(words: str, most: int = 200) -> str:
    """Fit for a terminal, whoever wrote it."""
    return "".join(c for c in words[:most] if c.isprintable())


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print words as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, expand=False)
    for row in rows:
        table.add_row(*map(plain, row))
    Console(markup=False, emoji=False, highlight=False).print(table)


def warn_of_shared_part(algorithm: str) -> None:
    """Say on stderr that a run's adapter is not what its silos were measured with, where each has its own model."""
    from fedlm.recipe.methods import ALGORITHMS

    if ALGORITHMS[algorithm].personal:
        typer.secho(
            f"Note: with '{algorithm}' each silo has a model of its own, part of which never leaves it. This is the "
            "shared part alone, which may do much less.",
            fg=typer.colors.YELLOW,
            err=True,
        )
