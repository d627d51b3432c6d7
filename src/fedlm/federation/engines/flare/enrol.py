"""How a silo gets its certificate without its private key ever leaving it.

    silo         join INVITATION   -> a key here, and a request with the public half
    coordinator  approve REQUEST   -> the request signed by the consortium's CA
    silo         join SIGNED       -> a complete kit, if the root certificate is the invited one

Files of others are checked before anything is made of them: names against the list of silos, the root certificate
against its fingerprint, and all the rest by NVFlare's tools, whose formats they are.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedlm import __version__
from fedlm.errors import NetworkError, RecipeError
from fedlm.federation.engines.flare.checks import fingerprint, same_fingerprint
from fedlm.federation.engines.flare.consortium import silo
from fedlm.federation.engines.flare.kit import (
    KIT_FILE,
    Kit,
    parse_kit,
    private_folder,
    read_kit,
)
from fedlm.federation.engines.flare.provision import (
    PROFILE,
    finish_silo,
    member,
    read_members,
    root_of,
    today,
    write_members,
    write_yaml,
)
from fedlm.federation.engines.flare.tools import nvflare, take_startup
from fedlm.recipe.yamltree import parse_yaml

PENDING = "pending"
"""In a kit that waits for its certificate: the private key, the request and the invitation."""

_INVITATION = "invitation.yaml"
_LARGEST = 2**20  # a request or a signed certificate is a few kB


@dataclass(frozen=True)
class Requested:
    """A silo's request: where it lies, and what to compare by telephone."""

    file: Path
    kit: Path
    root: str
    """Fingerprint of the network's root certificate, by the invitation."""
    key: str
    """Fingerprint of the silo's public key."""


@dataclass(frozen=True)
class Approved:
    """A signed request."""

    file: Path
    name: str
    root: str
    key: str
    until: str


def request(invitation: Path, out: Path, folder: Path) -> Requested:
    """Make the silo's private key and ask for a certificate.

    Args:
        invitation: the file from the coordinator.
        out: the kit to make; a kit of the same silo gets a new key, and keeps its state.
        folder: where the request is written, to be sent to the coordinator.

    Raises:
        NetworkError: the invitation is damaged, or `out` is something else.
    """
    out = out.resolve()
    kit = _invited(invitation, out)
    if (out / KIT_FILE).exists():
        old = read_kit(out, "silo")
        if (old.network, old.name) != (kit.network, kit.name):
            raise NetworkError(
                f"this is the kit of {old.name} in {old.network}",
                where=str(out),
                fix="choose another folder with --out",
            )
    elif out.exists() and any(out.iterdir()) and not (out / PENDING / _INVITATION).exists():
        raise NetworkError("this folder holds something else", where=str(out), fix="choose another with --out")
    target = folder / f"{kit.name}.request.zip"
    if target.exists():
        raise NetworkError("this file is there already", where=str(target), fix="remove it")
    private_folder(out)
    pending = out / PENDING
    shutil.rmtree(pending, ignore_errors=True)
    private_folder(pending)
    party = {"name": kit.name, "type": "client", "org": kit.org}
    write_yaml(pending / "party.yaml", {"name": kit.network, "participants": [party]})
    words = ("cert", "request", "-p", str(pending / "party.yaml"), "--out", str(pending / "request"))
    made = Path(nvflare(*words, records=pending)["request_zip"])
    shutil.copyfile(made, target)
    (pending / _INVITATION).write_bytes(invitation.read_bytes())
    return Requested(target, out, kit.root, _key_of(_zip_json(target, "request.json")))


def approve(kit: Kit, request_zip: Path, folder: Path, days: int = 365, renew: bool = False) -> Approved:
    """Sign a silo's request with the consortium's CA.

    Args:
        kit: the coordinator's kit, with its CA.
        request_zip: what the silo sent.
        folder: where the result is written, to be sent back.
        days: how long the certificate is valid.
        renew: sign although the silo has a certificate, which stays valid until it expires.

    Raises:
        NetworkError: the request is damaged, not of a silo of this network, of another organisation, or a second one.
    """
    said = _zip_json(request_zip, "request.json")
    where = request_zip.name
    if said.get("project") != kit.network:
        raise NetworkError(
            f"this is a request to the network '{said.get('project')}', not to {kit.network}", where=where
        )
    if said.get("kind") != "site":
        raise NetworkError(f"this asks for a certificate of a {said.get('kind')}, not of a silo", where=where)
    name = str(said.get("name"))
    known = member(kit, name)
    if said.get("org") != known["org"]:
        raise NetworkError(
            f"{name} belongs to '{known['org']}', the request says '{said.get('org')}'",
            where=where,
            fix="ask the silo whether it sent this",
        )
    if known["signed"] and not renew:
        raise NetworkError(
            f"{name} has a certificate already, signed {known['signed']}",
            where=where,
            fix="--renew if it asked for a new one; with a stolen key, `fedlm network revoke` it instead",
        )
    target = folder / f"{name}.signed.zip"
    if target.exists():
        raise NetworkError("this file is there already", where=str(target), fix="remove it")
    words = ("cert", "approve", str(request_zip.resolve()), "-c", str(kit.ca), "--profile", str(kit.ca / PROFILE))
    nvflare(*words, "--out", str(target.resolve()), "--valid-days", str(days), records=kit.ca)
    signed = _zip_json(target, "signed.json")
    if signed.get("name") != name:  # what was approved is what was looked at
        target.unlink()
        raise NetworkError("the request changed while it was signed", where=where)
    write_members(kit, read_members(kit) | {name: {**known, "signed": today()}})
    return Approved(target, name, root_of(kit.ca), _key_of(signed), str(signed["certificate"]["valid_until"]))


def complete(signed_zip: Path, out: Path, expected: str | None = None) -> Kit:
    """Complete the silo's kit with its certificate.

    Args:
        signed_zip: what the coordinator sent back.
        out: the kit that `request` began.
        expected: the root certificate's fingerprint as heard by telephone; the invitation's must be the same.

    Raises:
        NetworkError: nothing was begun there, another root certificate, another coordinator, or a damaged file.
    """
    out = out.resolve()
    pending = out / PENDING
    if not (pending / _INVITATION).exists():
        raise NetworkError(
            "no request was made in this kit",
            where=str(out),
            fix="begin with `fedlm network join NAME.invitation.yaml --out KIT`, and use the same --out",
        )
    kit = _invited(pending / _INVITATION, out)
    if expected is not None and not same_fingerprint(expected, kit.root):
        raise NetworkError(
            f"the invitation was for a network with the root certificate {kit.root}, not {expected}",
            where=str(out),
            fix="ask the coordinator which one is right, and do not use this invitation until you know",
        )
    signed = _zip_json(signed_zip, "signed.json")
    for what, mine in (("name", kit.name), ("project", kit.network), ("org", kit.org)):
        if signed.get(what) != mine:
            raise NetworkError(f"this is signed for {what} '{signed.get(what)}', not '{mine}'", where=signed_zip.name)
    server = signed.get("server") or {}
    if (server.get("host"), server.get("fed_learn_port")) != (kit.host, kit.port):
        raise NetworkError(
            f"this names the coordinator {server.get('host')}:{server.get('fed_learn_port')}, "
            f"the invitation named {kit.host}:{kit.port}",
            where=signed_zip.name,
            fix="ask the coordinator, and begin again with a new invitation",
        )
    _package(signed_zip, kit, pending)
    finish_silo(kit)
    shutil.rmtree(pending)  # it holds a second copy of the private key
    return kit


def _package(signed_zip: Path, kit: Kit, pending: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".package-", dir=kit.path) as name:
        desk = Path(name)
        words = ("package", str(signed_zip.resolve()), "--request-dir", str(pending / "request"), "-w", str(desk))
        built = Path(nvflare(*words, "--fingerprint", kit.root, records=desk)["output_dir"]) / "startup"
        if not same_fingerprint(fingerprint((built / "rootCA.pem").read_bytes()), kit.root):
            raise NetworkError("the root certificate is not the invited one", where=signed_zip.name)
        private_folder(kit.workspace)
        take_startup(built, kit.startup)


def _invited(invitation: Path, kit: Path) -> Kit:
    """The kit that an invitation is for. Raises NetworkError: damaged, or of another format."""
    fix = "ask the coordinator for it again"
    try:
        data = parse_yaml(invitation.read_text(encoding="utf-8"), str(invitation)).data
    except (OSError, UnicodeDecodeError, RecipeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no invitation"
        raise NetworkError(f"cannot be read: {reason}", where=str(invitation), fix=fix) from None
    if not isinstance(data, dict) or "root" not in data or not same_fingerprint(str(data["root"]), str(data["root"])):
        raise NetworkError("this is no invitation", where=str(invitation), fix=fix)
    party = silo(str(data.get("name")), str(data.get("org")))
    try:
        said = {**data, "kind": "silo", "keys": "own", "created": today(), "fedlm": __version__}
        made = replace(parse_kit(invitation, said), path=kit)
    except NetworkError:
        raise NetworkError("this invitation is damaged, or of another fedlm", where=str(invitation), fix=fix) from None
    return replace(made, name=party.name, org=party.org)


def _zip_json(path: Path, member_name: str) -> dict[str, Any]:
    """A JSON file of a zip from elsewhere. Raises NetworkError when it is not what it should be."""
    fix = "send it again, unopened"
    try:
        with zipfile.ZipFile(path) as archive:
            about = archive.getinfo(member_name)
            if about.file_size > _LARGEST:
                raise ValueError
            data = json.loads(archive.read(member_name))
    except OSError as error:
        raise NetworkError(f"cannot be read: {error.strerror or error}", where=str(path), fix=fix) from None
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        what = member_name.removesuffix(".json")
        raise NetworkError(f"this is not a {what} zip, or it is damaged", where=str(path), fix=fix) from None
    if not isinstance(data, dict):
        raise NetworkError("this zip is damaged", where=str(path), fix=fix)
    return data


def _key_of(said: dict[str, Any]) -> str:
    """A public key's fingerprint, from a request or a signed certificate."""
    digest = str(said.get("public_key_sha256") or (said.get("hashes") or {}).get("public_key_sha256", "")).upper()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))
