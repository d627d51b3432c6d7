"""What commands print for scripts: one JSON value on stdout, nothing else."""

from __future__ import annotations

import json
from typing import Any

import typer


def print_json(value: Any) -> None:
    """Print one JSON value; NaN and infinities are refused, since JSON has none."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True, allow_nan=False))
