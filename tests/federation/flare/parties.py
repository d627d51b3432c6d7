"""Kits for tests, made by the real tools, and their real NVFlare processes."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from nvflare.lighter.utils import Identity, generate_cert, serialize_cert

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.ask import status_of
from fedlm.federation.engines.flare.consortium import Consortium, Coordinator, Operator, Silo
from fedlm.federation.engines.flare.kit import Kit, read_kit
from fedlm.federation.engines.flare.processes import Child
from fedlm.federation.engines.flare.provision import new_network
from fedlm.federation.engines.flare.rehearsal import free_port as free_port
from fedlm.federation.engines.flare.start import relay

SILOS = ("hospital-a", "hospital-b")


def consortium(port: int | None = None, silos: tuple[str, ...] = SILOS) -> Consortium:
    return Consortium(
        name="hospitals",
        coordinator=Coordinator(host="localhost", port=port or free_port(), org="university"),
        operators=(Operator(name="ops@example.org", role="lead"), Operator(name="guest@example.org", role="member")),
        silos=tuple(Silo(name=name, org=name.replace("-", "_")) for name in silos),
    )


def demo_network(folder: Path, port: int | None = None) -> dict[str, Kit]:
    """Kits with demo keys, by party."""
    return {path.name: read_kit(path) for path in new_network(consortium(port), folder, demo=True)}


def certificate(kit: Kit, ca: Path, *, start: float, end: float, role: str | None = None) -> bytes:
    """A certificate for the kit's key, valid from and to so many days from now, signed by the CA in a folder."""
    key = serialization.load_pem_private_key(kit.key.read_bytes(), None)
    signer = serialization.load_pem_private_key((ca / "rootCA.key").read_bytes(), None)
    issuer = x509.load_pem_x509_certificate((ca / "rootCA.pem").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    made = generate_cert(
        Identity(kit.name, kit.org, role),
        Identity(issuer.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value),
        signer,
        key.public_key(),
        not_valid_before=now + datetime.timedelta(days=start),
        not_valid_after=now + datetime.timedelta(days=end),
    )
    return bytes(serialize_cert(made))


def edit(kit: Kit, name: str, change: Callable[[Any], None]) -> None:
    """Change one of the kit's local settings, as a careless or dishonest owner might."""
    path = kit.local / name
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@contextlib.contextmanager
def running(*kits: Kit) -> Iterator[list[Child]]:
    """The NVFlare processes of these kits."""
    children = [relay(kit) for kit in kits]
    try:
        for child in children:
            child.start()
        yield children
    finally:
        for child in children:
            # a job's process has a session of its own, and would look for its dead parents for ever
            below = psutil.Process(child.process.pid).children(recursive=True) if child.process else []
            child.stop()
            for process in below:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


def seen(coordinator: Kit, silo: str) -> dict[str, Any]:
    """What the coordinator knows of a silo; nothing while it is starting."""
    try:
        found: dict[str, Any] = status_of(coordinator)["silos"].get(silo, {})
    except NetworkError:
        return {}
    return found


def connected(coordinator: Kit, silo: str) -> bool:
    return bool(seen(coordinator, silo).get("connected"))


def log_of(kit: Kit) -> str:
    file = kit.logs / "nvflare.log"
    return file.read_text() if file.exists() else ""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # a zombie is gone, only not yet buried
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
