"""Making a network: the consortium's CA, the coordinator's kit, and an invitation for each silo.

Every party's private key is made where it will be used. Only with `demo` are all keys made in one place, and then every
kit says so. NVFlare's own tools make keys and certificates.
"""

from __future__ import annotations

import datetime
import json
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from fedlm import __version__
from fedlm.errors import NetworkError, nearest
from fedlm.federation.engines.flare.checks import fingerprint
from fedlm.federation.engines.flare.consortium import Consortium, Operator, Silo
from fedlm.federation.engines.flare.kit import (
    Keys,
    Kit,
    private_folder,
    write_kit,
    write_private,
)
from fedlm.federation.engines.flare.settings import write_settings
from fedlm.federation.engines.flare.tools import need_nvflare, nvflare, provision, take_startup, tighten

MEMBERS = "members.json"
"""In KIT/ca: who was invited, and whose certificate was signed when."""

PROFILE = "project_profile.yaml"
_BUILDERS = (
    {"path": "nvflare.lighter.impl.workspace.WorkspaceBuilder"},
    {
        "path": "nvflare.lighter.impl.static_file.StaticFileBuilder",
        "args": {"config_folder": "config", "scheme": "grpc"},
    },
    {"path": "nvflare.lighter.impl.cert.CertBuilder"},
)


def today() -> str:
    """The time now, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def new_network(consortium: Consortium, out: Path, demo: bool = False) -> list[Path]:
    """Make the coordinator's kit and the silos' invitations (with `demo`: the silos' kits).

    Args:
        consortium: who takes part.
        out: folder to write to; made if missing.
        demo: make all private keys here.

    Returns:
        What was written: the coordinator's kit first.

    Raises:
        NetworkError: something of that name is there already, or NVFlare's tools refuse.
        MissingExtra: NVFlare is not installed.
    """
    need_nvflare()
    names = [s.name if demo else f"{s.name}.invitation.yaml" for s in consortium.silos]
    targets = [out / "coordinator", *(out / name for name in names)]
    for target in targets:
        if target.exists():
            raise NetworkError(
                "this is there already", where=str(target), fix="choose another folder with --out, or remove it"
            )
    out.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed: a failure on the way leaves no half network.
    with tempfile.TemporaryDirectory(prefix=".fedlm-network-", dir=out.resolve()) as name:
        workshop = Path(name)
        made = (_demo if demo else _own)(consortium, workshop)
        for built, target in zip(made, targets, strict=True):
            built.rename(target)
    return targets


def _own(consortium: Consortium, workshop: Path) -> list[Path]:
    kit = _coordinator(consortium, workshop, "own")
    private_folder(kit.ca)
    write_yaml(kit.ca / PROFILE, profile(kit))
    nvflare("cert", "init", "--profile", str(kit.ca / PROFILE), "-o", str(kit.ca), records=kit.ca)
    server = {"name": kit.host, "type": "server", "org": kit.org}
    _enrol(kit, server | {"fed_learn_port": kit.port, "admin_port": kit.port}, kit.startup)
    for operator, folder in _operators(consortium, kit):
        _enrol(kit, _operator(operator, consortium), folder)
    kit = _finish(kit, consortium)
    invitations = []
    for silo in consortium.silos:
        invitations.append(workshop / f"{silo.name}.invitation.yaml")
        write_invitation(kit, silo, invitations[-1])
    return [kit.path, *invitations]


def _enrol(kit: Kit, participant: dict[str, Any], startup: Path) -> None:
    """Make a key here, have the CA here sign it, and put the result in `startup`."""
    with tempfile.TemporaryDirectory(prefix=".enrol-", dir=kit.path) as name:
        desk = Path(name)
        write_yaml(desk / "party.yaml", {"name": kit.network, "participants": [participant]})
        request = ("cert", "request", "-p", str(desk / "party.yaml"), "--out", str(desk / "request"))
        asked = nvflare(*request, records=desk)
        signed = desk / "party.signed.zip"
        words = ("cert", "approve", asked["request_zip"], "-c", str(kit.ca), "--profile", str(kit.ca / PROFILE))
        nvflare(*words, "--out", str(signed), records=kit.ca)
        package = ("package", str(signed), "--request-dir", str(desk / "request"), "-w", str(desk / "workspace"))
        built = nvflare(*package, "--fingerprint", root_of(kit.ca), records=desk)
        take_startup(Path(built["output_dir"]) / "startup", startup)


def _demo(consortium: Consortium, workshop: Path) -> list[Path]:
    kit = _coordinator(consortium, workshop, "demo")
    server = {"name": kit.host, "type": "server", "org": kit.org, "fed_learn_port": kit.port, "admin_port": kit.port}
    silos = [{"name": s.name, "type": "client", "org": s.org} for s in consortium.silos]
    people = [_operator(o, consortium) for o in consortium.everyone()]
    project = {"api_version": 3, "name": kit.network, "participants": [server, *silos, *people]}
    desk = private_folder(workshop / "provision")
    write_yaml(desk / "project.yaml", project | {"builders": list(_BUILDERS)})
    parties = provision(desk / "project.yaml", private_folder(desk / "workspace"))
    take_startup(parties / kit.host / "startup", kit.startup)
    for operator, folder in _operators(consortium, kit):
        take_startup(parties / operator.name / "startup", folder)
    _keep_ca(kit, parties.parent / "state" / "cert.json")
    kit = _finish(kit, consortium)
    made = [kit.path]
    for silo in consortium.silos:
        folder = private_folder(workshop / silo.name)
        ours = replace(kit, path=folder, kind="silo", name=silo.name, org=silo.org, silos=())
        take_startup(parties / silo.name / "startup", ours.startup)
        finish_silo(ours)
        made.append(folder)
    return made


def _keep_ca(kit: Kit, state: Path) -> None:
    """Keep the provisioner's CA in the form of `nvflare cert`, so that silos can be added to a demo network too."""
    data = json.loads(state.read_text())
    private_folder(kit.ca)
    write_private(kit.ca / "rootCA.pem", data["root_cert"].encode())
    write_private(kit.ca / "rootCA.key", data["root_pri_key"].encode())
    about = {"project": kit.network, "created_at": kit.created, "provision_version": "00"}
    about["rootCA_fingerprint"] = "SHA256:" + root_of(kit.ca)
    write_private(kit.ca / "ca.json", json.dumps(about).encode())
    write_yaml(kit.ca / PROFILE, profile(kit))


def _coordinator(consortium: Consortium, workshop: Path, keys: Keys) -> Kit:
    return Kit(
        path=private_folder(workshop / "coordinator"),
        kind="coordinator",
        network=consortium.name,
        name="coordinator",
        org=consortium.coordinator.org,
        fedlm=__version__,
        host=consortium.coordinator.host,
        port=consortium.coordinator.port,
        keys=keys,
        created=today(),
        silos=tuple(s.name for s in consortium.silos),
    )


def _operators(consortium: Consortium, kit: Kit) -> list[tuple[Operator, Path]]:
    """Each operator and where their certificate goes: the first lead's where `fedlm run` looks for it."""
    people = sorted(consortium.everyone(), key=lambda o: o.role != "lead")
    return [(o, kit.path / "operators" / o.name / "startup" if i else kit.operator) for i, o in enumerate(people)]


def _operator(operator: Operator, consortium: Consortium) -> dict[str, Any]:
    return {"name": operator.name, "type": "admin", "org": consortium.coordinator.org, "role": operator.role}


def _finish(kit: Kit, consortium: Consortium) -> Kit:
    kit = replace(kit, root=fingerprint(kit.root_certificate.read_bytes()))
    signed = kit.created if kit.keys == "demo" else None
    write_members(kit, {s.name: {"org": s.org, "signed": signed} for s in consortium.silos})
    write_settings(kit)
    write_kit(kit)
    tighten(kit.path)
    return kit


def finish_silo(kit: Kit) -> None:
    """Complete a silo's kit around its `startup/`."""
    private_folder(kit.state)
    write_settings(kit)
    write_kit(kit)
    tighten(kit.workspace)


def add_silo(kit: Kit, silo: Silo, target: Path) -> None:
    """Enrol one more silo: write its invitation.

    Raises:
        NetworkError: the name is taken, or the kit has no CA.
    """
    members = read_members(kit)
    if silo.name.lower() in {m.lower() for m in members}:
        raise NetworkError(f"'{silo.name}' is enrolled already", where=str(kit.path), fix="choose another name")
    if target.exists():
        raise NetworkError("this file is there already", where=str(target), fix="remove it, or name another")
    write_members(kit, members | {silo.name: {"org": silo.org, "signed": None}})
    write_kit(replace(kit, silos=(*kit.silos, silo.name)))
    write_invitation(kit, silo, target)


def write_invitation(kit: Kit, silo: Silo, target: Path) -> None:
    """Write what a silo needs to ask for a certificate. It holds no secret."""
    data = {"format": 1, "network": kit.network, "name": silo.name, "org": silo.org, "host": kit.host}
    data |= {"port": kit.port, "root": kit.root, "fedlm": __version__, "created": today()}
    head = (
        f"# Invitation of {silo.name} to the network {kit.network}: fedlm network join {silo.name}.invitation.yaml\n"
        "# Nothing here is secret. Compare `root` with the coordinator by telephone before you rely on it.\n"
    )
    write_yaml(target, data, head)
    target.chmod(0o644)


def profile(kit: Kit) -> dict[str, Any]:
    """NVFlare's project profile of a network."""
    server = {"host": kit.host, "fed_learn_port": kit.port, "admin_port": kit.port}
    return {"name": kit.network, "scheme": "grpc", "connection_security": "mtls", "server": server}


def root_of(folder: Path) -> str:
    """Fingerprint of the root certificate in a folder."""
    return fingerprint((folder / "rootCA.pem").read_bytes())


def read_members(kit: Kit) -> dict[str, dict[str, Any]]:
    """Who was invited: name -> {org, signed}.

    Raises:
        NetworkError: this kit has no CA.
    """
    try:
        members: dict[str, dict[str, Any]] = json.loads((kit.ca / MEMBERS).read_text())
    except (OSError, ValueError):
        raise NetworkError(
            "this kit has no certificate authority, so it cannot enrol silos",
            where=str(kit.path),
            fix="use the kit that `fedlm network new` made, where it made it",
        ) from None
    return members


def member(kit: Kit, name: str) -> dict[str, Any]:
    """One enrolled silo. Raises NetworkError for a name that is not enrolled, or a kit without CA."""
    members = read_members(kit)
    if name not in members:
        fix = f"{nearest(name, members)} To enrol it: `fedlm network add`"
        raise NetworkError(f"'{name}' is not enrolled in {kit.network}", where=str(kit.path), fix=fix)
    return members[name]


def write_members(kit: Kit, members: dict[str, dict[str, Any]]) -> None:
    write_private(kit.ca / MEMBERS, (json.dumps(members, indent=1) + "\n").encode())


def write_yaml(path: Path, data: Any, head: str = "") -> None:
    """Write plain data as YAML, readable by this user alone."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style, yaml.width = False, 200
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    text = StringIO()
    text.write(head)
    yaml.dump(data, text)
    write_private(path, text.getvalue().encode())
