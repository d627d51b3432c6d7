"""`fedlm silo`: the side of a network that owns text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.coordinator import JsonLogs


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Run a silo's side of a network.")
    group.callback()(_group)
    group.command("start")(start)
    app.add_typer(group, name="silo")


def _group() -> None:
    """Run a silo's side of a network."""


def start(
    kit: Annotated[Path, typer.Argument(help="The silo's kit.", show_default=False)],
    data: Annotated[Path, typer.Option(help="YAML file that says where the silo's text lies.", show_default=False)],
    policy: Annotated[Path | None, typer.Option(help="YAML file with what the silo's owner allows.")] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Serve /metrics and /health on this port of 127.0.0.1.", min=0, max=65535),
    ] = None,
    json_logs: JsonLogs = False,
) -> None:
    """Connect to the coordinator and train on this silo's text when asked, until Ctrl-C or SIGTERM.

    No inbound port is needed. Two processes run: the connection, and the worker that owns text, model and policy; each
    is started again when it dies.

    \b
    Examples:
      fedlm silo start hospital-a --data data.yaml
      fedlm silo start hospital-a --data data.yaml --policy policy.yaml --metrics-port 9464
    """
    from fedlm.federation.engines.flare.kit import read_kit
    from fedlm.federation.engines.flare.start import configure_logs, run_silo

    party = read_kit(kit, "silo")
    run_silo(party, data, policy, configure_logs(party, json_logs), metrics_port)
