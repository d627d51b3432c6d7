"""`fedlm silo`: the side of a network that owns text."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedlm.cli.coordinator import JsonLogs


def register(app: typer.Typer) -> None:
    """Add the group."""
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Run a silo's side of a network.")
    group.callback()(_group)
    for command in (start, data, policy):
        group.command(command.__name__)(command)
    audit = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Look after this silo's audit log.")
    audit.callback()(_audit)
    audit.command("prune")(prune)
    group.add_typer(audit, name="audit")
    app.add_typer(group, name="silo")


def _group() -> None:
    """Run a silo's side of a network."""


def _audit() -> None:
    """Look after this silo's audit log; `fedlm audit log` reads it."""


def prune(
    kit: Annotated[Path, typer.Argument(help="The silo's kit, or its audit log.", show_default=False)],
    before: Annotated[
        datetime,
        typer.Option(help="Remove what is older than this day (UTC).", formats=["%Y-%m-%d"], show_default=False),
    ],
) -> None:
    """Remove old lines of the audit log. A checkpoint with their hash stays in their place; a running silo goes on.

    A log that is not intact is not pruned.

    \b
    Example:
      fedlm silo audit prune hospital-a --before 2026-01-01
    """
    from fedlm.cli.audit import log_of
    from fedlm.federation.silo.auditlog import AuditLog

    file = log_of(kit)
    removed = AuditLog(file).prune(before.replace(tzinfo=UTC))
    typer.echo(
        f"{file}: {removed} lines removed" + ("; a checkpoint with their hash is in their place" if removed else "")
    )


def start(
    kit: Annotated[Path, typer.Argument(help="The silo's kit.", show_default=False)],
    data: Annotated[Path, typer.Option(help="YAML file that says where the silo's text lies.", show_default=False)],
    policy: Annotated[
        Path | None, typer.Option(help="YAML file with what the silo's owner allows; needed.", show_default=False)
    ] = None,
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
      fedlm silo start hospital-a --data data.yaml --policy policy.yaml
      fedlm silo start hospital-a --data data.yaml --policy policy.yaml --metrics-port 9464
    """
    from fedlm.federation.engines.flare.kit import read_kit
    from fedlm.federation.engines.flare.start import configure_logs, run_silo

    party = read_kit(kit, "silo")
    run_silo(party, data, policy, configure_logs(party, json_logs), metrics_port)


def data(
    file: Annotated[Path | None, typer.Argument(help="DATA.yaml, to check it.", show_default=False)] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a commented file to start from.")] = False,
) -> None:
    """Check the file that says where this silo's text lies.

    \b
    Examples:
      fedlm silo data --example > data.yaml
      fedlm silo data data.yaml
    """
    from importlib import resources

    if example:
        typer.echo((resources.files("fedlm.federation.silo") / "data.example.yaml").read_text("utf-8"), nl=False)
        return
    if file is None:
        raise typer.BadParameter("give a file to check, or --example for one to start from")
    from fedlm.data.sources import locate
    from fedlm.federation.silo.holdings import load_holdings

    text = load_holdings(file)
    for source in text.spec.sources:
        locate(source, text.base)
    what = "the share that a recipe deals to it (for demonstrations)" if text.spec.share_of_recipe else "its own text"
    typer.echo(f"{file} is a valid data file: {what}, {len(text.spec.sources)} sources.")


def policy(
    file: Annotated[Path | None, typer.Argument(help="policy.yaml, to check it.", show_default=False)] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a commented policy to start from.")] = False,
) -> None:
    """Check what this silo's owner allows.

    \b
    Examples:
      fedlm silo policy --example > policy.yaml
      fedlm silo policy policy.yaml
    """
    from fedlm.federation.silo.policy import example as text
    from fedlm.federation.silo.policy import load_policy

    if example:
        typer.echo(text(), nl=False)
        return
    if file is None:
        raise typer.BadParameter("give a file to check, or --example for one to start from")
    found = load_policy(file)
    typer.echo(f"{file} is a valid policy. Its rules, with those that it leaves out:")
    for name, value in found.model_dump(mode="json").items():
        if isinstance(value, bool):
            value = "yes" if value else "no"
        words = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"  {name}: {'no limit' if value is None else words or 'none'}")
