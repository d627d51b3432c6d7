"""`fedlm network`: who takes part, their certificates, and who is connected."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fedlm.cli.network_demo import demo
from fedlm.cli.output import print_json

KitOption = Annotated[Path, typer.Argument(help="The coordinator's kit.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the group."""
    help_line = "Make a network of organisations, enrol silos, and see who is connected."
    group = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help=help_line)
    for command in (new, join, approve, add, status, revoke, restore, demo):
        group.command(command.__name__)(command)
    app.add_typer(group, name="network")


def new(
    consortium: Annotated[
        Path | None, typer.Argument(help="Who takes part: consortium.yaml.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
    demo_keys: Annotated[
        bool, typer.Option("--demo-keys", help="Make all private keys here, the silos' too: for demonstrations only.")
    ] = False,
    example: Annotated[bool, typer.Option("--example", help="Print a commented consortium.yaml and leave.")] = False,
    as_json: Json = False,
) -> None:
    """Make the coordinator's kit, and an invitation for each silo.

    The silos' private keys are made by the silos (`fedlm network join`). With --demo-keys whole kits of silos are made
    here instead, and say so.

    \b
    Examples:
      fedlm network new --example > consortium.yaml
      fedlm network new consortium.yaml
      fedlm network new consortium.yaml --out demo --demo-keys
    """
    from fedlm.federation.engines.flare.consortium import EXAMPLE, read_consortium
    from fedlm.federation.engines.flare.kit import DEMO_LABEL, read_kit
    from fedlm.federation.engines.flare.provision import new_network

    if example:
        typer.echo(EXAMPLE, nl=False)
        return
    if consortium is None:
        raise typer.BadParameter("give a consortium.yaml, or --example for one to start from")
    made = new_network(read_consortium(consortium), out, demo_keys)
    kit = read_kit(made[0])
    if as_json:
        print_json({"keys": kit.keys, "root": kit.root, "kit": str(made[0]), "silos": [str(p) for p in made[1:]]})
        return
    typer.echo(f"coordinator's kit: {made[0]}")
    for path in made[1:]:
        typer.echo(f"{'silo kit' if demo_keys else 'invitation'}: {path}")
    typer.echo(f"root certificate (SHA-256): {kit.root}")
    if demo_keys:
        typer.secho(f"{DEMO_LABEL}: for demonstrations only", fg=typer.colors.YELLOW)
        start = "fedlm silo start KIT --data DATA.yaml --policy POLICY.yaml"
        typer.echo(f"next: fedlm coordinator start {made[0]}, and for each silo: {start}")
    else:
        typer.echo("next: send each invitation to its silo, which runs: fedlm network join NAME.invitation.yaml")
        typer.echo("Tell the silos the root certificate's fingerprint by telephone. Back up and guard KIT/ca.")


def join(
    file: Annotated[Path, typer.Argument(help="NAME.invitation.yaml, then NAME.signed.zip.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The silo's kit; ./NAME if not given.", show_default=False)] = None,
    fingerprint: Annotated[
        str | None, typer.Option(help="The root certificate's SHA-256 as the coordinator told you.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Join a network, in two steps: ask for a certificate, and complete the kit with it.

    The private key is made here and never leaves the kit.

    \b
    Examples:
      fedlm network join hospital-a.invitation.yaml
      fedlm network join hospital-a.signed.zip --fingerprint 8D:3A:...
    """
    from fedlm.federation.engines.flare.enrol import complete, request

    kit = out or Path(file.name.split(".")[0])
    if file.suffix == ".zip":
        done = complete(file, kit, fingerprint)
        if as_json:
            print_json({"kit": str(kit), "network": done.network, "name": done.name, "root": done.root})
            return
        typer.echo(f"the kit {kit} is complete: {done.name} of {done.network}")
        if fingerprint is None:
            typer.echo(f"root certificate (SHA-256): {done.root}")
            typer.echo("It is the invitation's. Compare it with the coordinator by telephone, or use --fingerprint.")
        typer.echo(f"next: fedlm silo start {kit} --data DATA.yaml --policy POLICY.yaml")
        return
    asked = request(file, kit, Path())
    if as_json:
        print_json({"kit": str(kit), "request": str(asked.file), "root": asked.root, "key": asked.key})
        return
    typer.echo(f"private key made in {kit} (it never leaves it)")
    typer.echo(f"request: {asked.file}, with the public key (SHA-256): {asked.key}")
    typer.echo(f"the invitation's root certificate (SHA-256): {asked.root}")
    typer.echo("next: send the request to the coordinator, and compare both fingerprints by telephone.")
    typer.echo(f"Then: fedlm network join {asked.file.name.removesuffix('.request.zip')}.signed.zip --out {kit}")


def approve(
    kit: KitOption,
    request: Annotated[Path, typer.Argument(help="NAME.request.zip, as the silo sent it.", show_default=False)],
    valid_days: Annotated[int, typer.Option(help="How long the certificate is valid.", min=1, max=3650)] = 365,
    renew: Annotated[
        bool, typer.Option("--renew", help="Also when the silo has a certificate, which stays valid until it expires.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Sign a silo's request. Names that are not enrolled are refused.

    \b
    Examples:
      fedlm network approve coordinator hospital-a.request.zip
      fedlm network approve coordinator hospital-a.request.zip --valid-days 90
    """
    from fedlm.federation.engines.flare.enrol import approve as sign
    from fedlm.federation.engines.flare.kit import read_kit

    done = sign(read_kit(kit, "coordinator"), request, Path(), valid_days, renew)
    if as_json:
        facts = {"file": str(done.file), "name": done.name, "root": done.root, "key": done.key}
        print_json(facts | {"valid_until": done.until})
        return
    typer.echo(f"signed: {done.file}, valid until {done.until}")
    typer.echo(f"{done.name}'s public key (SHA-256): {done.key}")
    typer.echo(f"root certificate (SHA-256): {done.root}")
    typer.echo(f"Compare both with {done.name} by telephone, then send it {done.file.name}.")


def add(
    kit: KitOption,
    name: Annotated[str, typer.Argument(help="The new silo.", show_default=False)],
    org: Annotated[str, typer.Option(help="Its organisation.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Enrol one more silo: write its invitation. A running coordinator need not be stopped.

    \b
    Example:
      fedlm network add coordinator hospital-d --org hospital_d
    """
    from fedlm.federation.engines.flare.consortium import silo
    from fedlm.federation.engines.flare.kit import read_kit
    from fedlm.federation.engines.flare.provision import add_silo

    target = Path(f"{name}.invitation.yaml")
    add_silo(read_kit(kit, "coordinator"), silo(name, org), target)
    if as_json:
        print_json({"name": name, "org": org, "invitation": str(target)})
    else:
        typer.echo(f"invitation: {target}. Send it to the silo, which runs: fedlm network join {target}")


def status(
    kit: Annotated[Path, typer.Argument(help="A coordinator's or a silo's kit.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Say who is connected: versions, clock, free memory, and what each silo says of its text (counts only).

    \b
    Examples:
      fedlm network status coordinator
      fedlm network status coordinator --json | jq '.silos | map_values(.connected)'
    """
    from fedlm.federation.engines.flare.ask import status_of
    from fedlm.federation.engines.flare.kit import read_kit

    party = read_kit(kit)
    answer = status_of(party)
    if as_json:
        print_json(answer)
    elif party.kind == "silo":
        typer.echo(f"{party.name} of {party.network}")
        typer.echo(f"coordinator: {'connected' if answer.get('connected') else 'not connected'}")
        busy = f", {answer['busy']}" if answer.get("busy") else ""
        typer.echo(f"worker: {'ready' if answer.get('worker') else 'not there'}{busy}")
    else:
        _table(party.network, answer)


def _table(network: str, answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    silos: dict[str, dict[str, Any]] = answer.get("silos", {})
    table = Table(title=network)
    for column in ("silo", "state", "seen", "worker", "fedlm", "clock", "free", "text"):
        table.add_column(column, no_wrap=column != "text", overflow="fold")
    for name, silo in sorted(silos.items()):
        table.add_row(name, *_row(silo))
    Console(markup=False, emoji=False).print(table)  # silos choose some of the words
    run = answer.get("run")
    typer.echo(f"run: {_plain(run)}" if run else "no run")


def _row(silo: dict[str, Any]) -> list[str]:
    state = "revoked" if silo.get("revoked") else "connected" if silo.get("connected") else "absent"
    seen, skew, memory = silo.get("last_seen"), silo.get("clock_skew"), silo.get("free_memory")
    worker = (silo.get("busy") or "ready") if silo.get("worker") else "-"
    return [
        state,
        "-" if seen is None else f"{seen:.0f} s ago",
        str(worker),
        str(silo.get("fedlm") or "-"),
        "-" if skew is None else f"{skew:+.1f} s",
        "-" if memory is None else f"{memory / 2**30:.1f} GiB",
        _plain(silo.get("card") or "-"),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)


def revoke(
    kit: KitOption, silo: Annotated[str, typer.Argument(help="The silo.", show_default=False)], as_json: Json = False
) -> None:
    """Refuse a silo from now on; at once when the coordinator runs. `fedlm network restore` takes it back.

    \b
    Example:
      fedlm network revoke coordinator hospital-b
    """
    _change(kit, silo, restore=False, as_json=as_json)


def restore(
    kit: KitOption, silo: Annotated[str, typer.Argument(help="The silo.", show_default=False)], as_json: Json = False
) -> None:
    """Accept a silo again that was revoked.

    \b
    Example:
      fedlm network restore coordinator hospital-b
    """
    _change(kit, silo, restore=True, as_json=as_json)


def _change(kit: Path, silo: str, *, restore: bool, as_json: bool) -> None:
    from fedlm.federation.engines.flare.ask import change_access
    from fedlm.federation.engines.flare.kit import read_kit

    at_once = change_access(read_kit(kit, "coordinator"), silo, restore)
    if as_json:
        print_json({"silo": silo, "revoked": not restore, "running": at_once})
    else:
        when = "at once" if at_once else "from the coordinator's next start"
        typer.echo(f"{silo} is {'accepted again' if restore else 'refused'} {when}")
