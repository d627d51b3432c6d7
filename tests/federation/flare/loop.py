"""A network inside this process: the relays and the engine as they are, with certificates, without NVFlare."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from fedlm.errors import NetworkError
from fedlm.federation.engines.flare.coordinator_relay import CoordinatorRelay
from fedlm.federation.engines.flare.kit import Kit, socket_path, write_kit
from fedlm.federation.engines.flare.session import UnreachableError
from fedlm.federation.engines.flare.silo_relay import SiloRelay, listen
from fedlm.federation.engines.flare.worker import serve
from fedlm.federation.engines.worker import Handle

Fault = Callable[[str, str], str | None]
"""Given the silo and the call's name: None to deliver, 'request' or 'reply' to lose that one."""


class LoopNetwork:
    """Carries messages between relays of this process; `fault` loses some."""

    def __init__(self) -> None:
        self.relays: dict[str, SiloRelay] = {}
        self.fault: Fault = lambda *_: None
        self.off: set[str] = set()
        self.gone: set[str] = set()
        self.largest = 0

    def send(self, silo: str, message: bytes, timeout: float) -> bytes:  # noqa: ARG002
        import json

        self.largest = max(self.largest, len(message))
        call = json.loads(message[4 : 4 + int.from_bytes(message[:4], "big")])["op"]
        lost = self.fault(silo, call)
        if silo in self.off or lost == "request":
            raise UnreachableError("it is not connected")
        answer = self.relays[silo].handle(message)
        self.largest = max(self.largest, len(answer))
        if lost == "reply":
            raise UnreachableError("it does not answer (TIMEOUT)")
        return answer

    def connected(self) -> dict[str, float]:
        return {name: 0.0 for name in self.relays if name not in self.off | self.gone}

    def revoked(self) -> list[str]:
        return sorted(self.gone)

    def revoke(self, silo: str, restore: bool) -> None:
        if silo not in self.relays:
            raise NetworkError(f"there is no silo '{silo}' in this network")
        (self.gone.discard if restore else self.gone.add)(silo)


def certificate(
    name: str, role: str, issuer: tuple[x509.Certificate, rsa.RSAPrivateKey] | None = None, days: int = 10
) -> tuple[x509.Certificate, rsa.RSAPrivateKey]:
    """A certificate with the subject that NVFlare writes; its own root without an issuer."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, name), x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role)]
    )
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=20))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    return built.sign(issuer[1] if issuer else key, hashes.SHA256()), key


def write_operator(folder: Path, root: tuple[x509.Certificate, rsa.RSAPrivateKey], role: str = "lead") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found, key = certificate("ops@example.org", role, root)
    (folder / "client.crt").write_bytes(found.public_bytes(serialization.Encoding.PEM))
    (folder / "client.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def make_kit(folder: Path, kind: str, name: str, silos: tuple[str, ...] = ()) -> Kit:
    folder.mkdir(parents=True)
    kit = Kit(
        path=folder.resolve(),
        kind=kind,  # type: ignore[arg-type]
        network="loop",
        name=name,
        org="org",
        fedlm="0.1.0",
        host="localhost",
        port=8002,
        keys="demo",
        created="2026-01-01",
        silos=silos,
        root="",
    )
    write_kit(kit)
    return kit


class Loop:
    """A coordinator's relay and its silos' relays, each silo with a worker thread that answers with `handle`."""

    def __init__(self, folder: Path, silos: tuple[str, ...], handles: dict[str, Handle]) -> None:
        self.network = LoopNetwork()
        self.root = certificate("root", "")
        self.kit = make_kit(folder / "coordinator", "coordinator", "coordinator", silos)
        write_operator(self.kit.operator, self.root)
        self.silos = silos
        self.kits = {}
        for name in silos:
            self.kits[name] = kit = make_kit(folder / name, "silo", name)
            self.network.relays[name] = SiloRelay(name, kit.run / "spool", listen(socket_path(kit.path)))
            if name in handles:
                self.start_worker(name, handles[name])
        self.start_coordinator()

    def start_coordinator(self) -> None:
        listener = listen(socket_path(self.kit.path))
        pem = self.root[0].public_bytes(serialization.Encoding.PEM)
        self.relay = CoordinatorRelay("loop", lambda: list(self.silos), self.network, listener, pem)

    def start_worker(self, name: str, handle: Handle) -> None:
        path = socket_path(self.kits[name].path)
        threading.Thread(target=serve, args=[path, handle, {"fedlm": "0.1.0"}], daemon=True).start()
