"""Everything that keeps a party from its network, looked at one by one: `fedlm doctor --network KIT`."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedlm import __version__
from fedlm.errors import FedlmError, NetworkError
from fedlm.federation.engines.flare.ask import NotRunningError, revoked, status_of
from fedlm.federation.engines.flare.checks import (
    check_certificate,
    days_left,
    fingerprint,
    key_matches,
    may_run,
    same_fingerprint,
)
from fedlm.federation.engines.flare.kit import DEMO_LABEL, Kit, read_kit
from fedlm.federation.engines.flare.processes import check_port
from fedlm.federation.engines.flare.start import SOON_DAYS, check_private, read, version_warnings

Level = Literal["ok", "note", "problem"]

_GIB = 2**30
_ROOM = 2 * _GIB
_SKEW_SECONDS = 5.0
_PATIENCE = 5.0


@dataclass(frozen=True)
class Found:
    """One thing looked at. A 'problem' keeps the party from the network."""

    name: str
    level: Level
    value: str
    fix: str = ""


def examine_kit(path: Path) -> list[Found]:
    """Look at a kit, its certificate, the way to the coordinator, and what runs; nothing is changed."""
    try:
        kit = read_kit(path)
    except NetworkError as error:
        return [_problem("kit", error)]
    demo = f"; {DEMO_LABEL}" if kit.keys == "demo" else ""
    who = f"the coordinator of {kit.network}" if kit.kind == "coordinator" else f"{kit.name} of {kit.network}"
    found = [Found("kit", "note" if demo else "ok", who + demo, "never use it with real data" if demo else "")]
    looks: list[tuple[str, Callable[[Kit], Iterator[Found]]]] = [
        ("permissions", _permissions),
        ("NVFlare", _nvflare),
        ("fedlm", _version),
        ("certificate", _certificate),
        ("disk", _disk),
    ]
    if kit.kind == "coordinator":
        looks += [("operator", _operator), ("coordinator", _coordinator)]
    else:
        looks += [("way to the coordinator", _way), ("processes", _silo)]
    for name, look in looks:
        try:
            found += look(kit)
        except FedlmError as error:
            found.append(_problem(name, error))
    return found


def _problem(name: str, error: FedlmError) -> Found:
    where = f"{error.where}: " if error.where else ""
    return Found(name, "problem", where + error.what, error.fix or "")


def _permissions(kit: Kit) -> Iterator[Found]:
    check_private(kit)
    about = kit.path.stat()
    if about.st_uid != os.getuid():
        yield Found("permissions", "problem", "the kit belongs to another user", "run fedlm as the kit's owner")
    elif about.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield Found("permissions", "note", "others may enter the kit's folder", f"chmod 700 {kit.path}")
    else:
        yield Found("permissions", "ok", "only this user can read the kit")


def _nvflare(_kit: Kit) -> Iterator[Found]:
    wanted = "2.9.0"
    try:
        version = importlib.metadata.version("nvflare")
    except importlib.metadata.PackageNotFoundError:
        yield Found("NVFlare", "problem", "not installed", "pip install 'fedlm[network]'")
        return
    if version != wanted:
        yield Found("NVFlare", "problem", f"{version}, fedlm is made for {wanted}", "pip install 'fedlm[network]'")
    else:
        yield Found("NVFlare", "ok", version)


def _version(kit: Kit) -> Iterator[Found]:
    for sentence in version_warnings(kit.fedlm):
        yield Found("fedlm", "note", sentence, "install the version that the coordinator names")
        return
    yield Found("fedlm", "ok", f"{__version__}, the kit was made by {kit.fedlm}")


def _certificate(kit: Kit) -> Iterator[Found]:
    pem, root = read(kit.certificate), read(kit.root_certificate)
    if kit.root and not same_fingerprint(fingerprint(root), kit.root):
        yield Found("root", "problem", "not the root certificate that this kit was made with", "make the kit again")
    owner = check_certificate(pem, root, kit.certificate.name)
    if not key_matches(kit.key, pem):
        yield Found("key", "problem", "the private key is not the certificate's", "make the kit again")
    expected = kit.host if kit.kind == "coordinator" else kit.name
    if owner.name != expected:
        yield Found("certificate", "problem", f"it is for '{owner.name}', not for '{expected}'", "make the kit again")
    left = days_left(pem)
    fix = "ask the coordinator for a new one in time" if left < SOON_DAYS else ""
    text = f"signed by this network's root, valid for {left:.0f} days"
    yield Found("certificate", "note" if fix else "ok", text, fix)


def _disk(kit: Kit) -> Iterator[Found]:
    free = shutil.disk_usage(kit.path).free
    text = f"{free / _GIB:.1f} GiB free for state and transfers"
    if free < _ROOM:
        yield Found("disk", "note", text, "make room: updates are spooled to this disk")
    else:
        yield Found("disk", "ok", text)


def _operator(kit: Kit) -> Iterator[Found]:
    yield Found("operator", "ok", f"{may_run(read(kit.operator / 'client.crt'), read(kit.root_certificate))} may run")


def _coordinator(kit: Kit) -> Iterator[Found]:
    try:
        status = status_of(kit)
    except NotRunningError:
        yield Found("relay", "note", "it does not run", f"fedlm coordinator start {kit.path}")
        check_port(kit.host, kit.port, patience=0.0)
        yield Found("port", "ok", f"{kit.port} is free")
        refused = revoked(kit)
        yield Found(
            "silos", "ok", f"{len(kit.silos)} enrolled" + (f", revoked: {', '.join(refused)}" if refused else "")
        )
        return
    yield Found("relay", "ok", "it runs")
    operator = kit.operator
    pair = (operator / "client.crt", operator / "client.key")
    # to itself it goes by loopback: its public name may lie behind a router that does not lead back in
    yield _handshake(kit, *pair, address="127.0.0.1")
    for name, silo in sorted(status.get("silos", {}).items()):
        yield _silo_seen(name, silo)


def _silo_seen(name: str, silo: dict[str, Any]) -> Found:
    if silo.get("revoked"):
        return Found(name, "note", "revoked", f"fedlm network restore KIT {name}, if it may come back")
    if not silo.get("connected"):
        return Found(name, "note", "not connected", "in the silo: fedlm silo start KIT, and fedlm doctor --network KIT")
    if not silo.get("worker"):
        return Found(name, "note", "connected, but its worker is not there", "look at the log of `fedlm silo start`")
    skew, version = silo.get("clock_skew"), silo.get("fedlm")
    if skew is not None and abs(skew) > _SKEW_SECONDS:
        return Found(name, "note", f"its clock is {skew:+.0f} s from ours", "set both clocks (NTP)")
    if version != __version__:
        return Found(name, "note", f"it has fedlm {version}, here is {__version__}", "install one version everywhere")
    return Found(name, "ok", "connected, worker ready")


def _way(kit: Kit) -> Iterator[Found]:
    try:
        addresses = sorted({str(a[4][0]) for a in socket.getaddrinfo(kit.host, kit.port, type=socket.SOCK_STREAM)})
    except OSError as error:
        raise NetworkError(
            f"{kit.host} has no address here ({error.strerror or error})",
            fix="check the name and this machine's name service",
        ) from None
    yield Found("host", "ok", f"{kit.host} is {', '.join(addresses)}")
    yield _handshake(kit, kit.certificate, kit.key)


def _handshake(kit: Kit, certificate: Path, key: Path, address: str | None = None) -> Found:
    """Connect as NVFlare would, as far as the encrypted channel."""
    name, where = "connection", f"{kit.host}:{kit.port}"
    try:
        plain = socket.create_connection((address or kit.host, kit.port), timeout=_PATIENCE)
    except OSError as error:
        fix = "is `fedlm coordinator start` running, and does every firewall on the way let this port through?"
        return Found(name, "problem", f"{where} cannot be reached: {error.strerror or error}", fix)
    context = ssl.create_default_context(cafile=str(kit.root_certificate))
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2"])
    with plain:
        try:
            with context.wrap_socket(plain, server_hostname=kit.host) as channel:
                # the coordinator's refusal of our certificate comes only with the first bytes
                if not channel.recv(1):
                    raise ssl.SSLError("it closed the connection")
        except ssl.SSLCertVerificationError as error:
            fix = "another program listens there, something on the way opens TLS, or the kit is of another network"
            reason = error.verify_message or str(error)
            return Found(name, "problem", f"{where} is not this network's coordinator: {reason}", fix)
        except (ssl.SSLError, ConnectionError) as error:
            reason = getattr(error, "reason", None) or str(error)
            fix = "is this kit of the network that listens there? Ask the coordinator for its log"
            return Found(name, "problem", f"{where} refuses this kit's certificate ({reason})", fix)
        except TimeoutError:
            fix = "something else listens there, or something on the way swallows TLS"
            return Found(name, "problem", f"{where} does not answer as a coordinator", fix)
    return Found(name, "ok", f"{where} answers, both certificates are accepted")


def _silo(kit: Kit) -> Iterator[Found]:
    try:
        status = status_of(kit)
    except NotRunningError:
        start = f"fedlm silo start {kit.path} --data DATA.yaml --policy POLICY.yaml"
        fix = f"{start}; if that runs, see {kit.logs}: the coordinator may refuse it"
        yield Found("relay", "note", "not registered with the coordinator from here", fix)
        return
    if status.get("connected"):
        yield Found("relay", "ok", "connected to the coordinator")
    else:
        yield Found("relay", "problem", "not connected to the coordinator", f"see {kit.logs / 'nvflare.log'}")
    if status.get("worker"):
        yield Found("worker", "ok", "ready")
    else:
        yield Found("worker", "problem", "not there", "see the output of `fedlm silo start`")
