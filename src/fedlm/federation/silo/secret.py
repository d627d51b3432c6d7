"""The secret from which a party draws noise that protects privacy."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlm.errors import PrivacyError
from fedlm.federation.disk import disk_errors
from fedlm.files import sync_folder
from fedlm.privacy.stream import SECRET_BYTES, fresh_secret

FILE = "_noise.key"
"""No run's name begins with '_'."""


def secret_of(folder: Path, simulated: tuple[int, str] | None) -> bytes:
    """32 bytes: made once for the folder and kept there, readable by its owner alone.

    Args:
        simulated: (seed, party) of a simulation, where everyone is one party: a test key that follows from both, and
            no file.

    Raises:
        PrivacyError: the file holds something else.
        RunError: it cannot be written.
    """
    if simulated is not None:
        info = b"fedlm: noise of a simulated party: " + simulated[1].encode()
        return HKDF(SHA256(), SECRET_BYTES, salt=None, info=info).derive(str(simulated[0]).encode())
    file = folder / FILE
    with disk_errors(file, "silo's state"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not file.exists():
            _make(file)
        secret = file.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise PrivacyError(
            f"the secret has {len(secret)} bytes, and a secret has {SECRET_BYTES}",
            where=str(file),
            fix="restore it; a new one is made once it is removed, which is safe",
        )
    return secret


def _make(file: Path) -> None:
    """Whole or not at all, and never over another."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, fresh_secret())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    with contextlib.suppress(FileExistsError):  # this silo may be at work in two processes
        os.link(fresh, file)
    fresh.unlink()
    sync_folder(file.parent)
