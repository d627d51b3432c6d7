"""`fedlm coordinator`: the side of a network that silos connect to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

JsonLogs = Annotated[bool, typer.Option("--json-logs", help="Log JSON lines; also FEDLM_LOG=json.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Run the coordinator's side of a network.")
    group.callback()(_group)
    group.command("start")(start)
    app.add_typer(group, name="coordinator")


def _group() -> None:
    """Run the coordinator's side of a network."""


def start(
    kit: Annotated[Path, typer.Argument(help="The coordinator's kit.", show_default=False)],
    json_logs: JsonLogs = False,
) -> None:
    """Listen for silos until Ctrl-C or SIGTERM; what dies is started again.

    Federations are then run with `fedlm run recipe.yaml --network KIT` on this machine.

    \b
    Examples:
      fedlm coordinator start coordinator
      fedlm coordinator start /var/lib/fedlm/coordinator --json-logs
    """
    from fedlm.federation.engines.flare.kit import read_kit
    from fedlm.federation.engines.flare.start import configure_logs, run_coordinator

    party = read_kit(kit, "coordinator")
    run_coordinator(party, configure_logs(party, json_logs))
