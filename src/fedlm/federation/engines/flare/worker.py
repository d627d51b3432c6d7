"""The silo's worker: the process that owns text, model and policy, and outlives the connection to the coordinator.

It serves the silo's relay over a Unix socket: requests as JSON, tensors as safetensors files in the relay's spool. When
the relay goes away (restarted, killed), the worker finishes and stores what it is doing, and connects again; the model
stays loaded. `fedlm silo start` runs it beside the relay and starts it again when it dies.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import fedlm
from fedlm import logs
from fedlm.errors import FedlmError, NetworkError
from fedlm.federation.engines.flare.figures import FILE, counted
from fedlm.federation.engines.flare.kit import Kit, read_kit, socket_path
from fedlm.federation.engines.lines import ClosedError, Lines, Message
from fedlm.federation.engines.worker import Handle, Inbox, answer_requests
from fedlm.messages import Failure, Observe, Reply, Request

if TYPE_CHECKING:
    from fedlm.federation.identities import Identity

log = logging.getLogger("fedlm.silo")

AGAIN_SECONDS = 0.5
"""Pause between tries to reach the relay."""

TAKEN_SECONDS = 60.0
"""Patience with a relay that says another worker serves the silo: it may still be reading the last words of one that
died."""


def serve(path: Path, handle: Handle, facts: Message, told: Callable[[bool], None] = lambda _: None) -> None:
    """Serve the relay at this socket, for ever: a relay that is gone is waited for.

    Args:
        handle: answers the requests.
        facts: versions, shown by `fedlm network status`.
        told: called with True when the relay is there, with False when it is gone.

    Raises:
        NetworkError: another worker serves this silo.
    """
    taken: float | None = None
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except OSError:
            connection.close()
            time.sleep(AGAIN_SECONDS)
            continue
        lines = Lines(connection)
        with contextlib.suppress(ClosedError):
            lines.send({"type": "worker", "facts": facts})
            welcome = lines.receive(timeout=30.0) or {}
            if welcome.get("type") == "error":
                lines.close()
                taken = taken or time.monotonic()
                if time.monotonic() - taken < TAKEN_SECONDS:
                    time.sleep(AGAIN_SECONDS)
                    continue
                raise NetworkError(str(welcome["reason"]), where=str(path), fix="stop the other one first")
            if welcome.get("type") == "welcome":
                taken = None
                told(True)
                answer_requests(lines, Inbox(lines), Path(welcome["spool"]), handle)
        lines.close()
        told(False)
        time.sleep(AGAIN_SECONDS)


def facts() -> Message:
    """What a worker says of itself."""
    import torch

    versions = {"fedlm": fedlm.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"fedlm": fedlm.__version__, "versions": versions, "pid": os.getpid()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A silo's worker; `fedlm silo start` runs it.")
    parser.add_argument("--kit", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--policy", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        logs.configure(logs.wanted())
        kit = read_kit(options.kit, "silo")
        logs.configure(logs.wanted(), role="worker", party=kit.name)
        handle = counted(owner(kit, options.data, options.policy), kit.run / FILE)
        serve(socket_path(kit.path), handle, facts(), _tell)
    except FedlmError as error:
        log.error("the worker cannot go on: %s", error)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def owner(kit: Kit, data: Path, policy: Path) -> Handle:
    """What answers a silo's requests: its owner's text and policy.

    Raises:
        FedlmError: the data file or the policy cannot be read.
    """
    from fedlm.federation.silo.own import OwnSilo

    silo = OwnSilo(kit.name, kit.state, data, policy, identity=identity_of(kit))

    def handle(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        return silo.handle(request, observe=quiet(observe), should_stop=should_stop)

    return handle


def identity_of(kit: Kit) -> Identity:
    """This silo's certificate, and the root that the others' must be issued by.

    Raises:
        NetworkError: the kit's files cannot be read.
    """
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    from fedlm.federation.identities import Identity
    from fedlm.privacy.secagg.identity import CertificateDirectory, CertificateSigner

    try:
        key = load_pem_private_key(kit.key.read_bytes(), None)
        assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
        signer = CertificateSigner(kit.certificate.read_bytes(), key)
        return Identity(signer, CertificateDirectory(kit.root_certificate.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise NetworkError(
            f"the kit's certificate or key cannot be read ({type(error).__name__})",
            where=str(kit.startup),
            fix="make the kit again with `fedlm network join`",
        ) from None


def quiet(observe: Observe) -> Observe:
    """Progress that is lost while the relay is away, instead of ending the training that it tells of."""

    def tell(event: Message) -> None:
        with contextlib.suppress(ClosedError):
            observe(event)

    return tell


def _tell(connected: bool) -> None:
    log.info("the worker is ready" if connected else "the relay is gone, the worker waits for it")


if __name__ == "__main__":
    sys.exit(main())
