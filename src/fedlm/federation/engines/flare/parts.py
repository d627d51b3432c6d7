"""Tensors files that travel in parts: received in order into a spool, hashed on the way, gone on from where they broke.

A file is named by the SHA-256 of its content, so a repeat of the same broadcast travels once, and what lies under a
complete name is what was sent.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

from fedlm.federation.engines.flare.envelope import PART

SPARE_DISK = 256 * 2**20
"""Bytes that stay free on the spool's disk."""

_DIGEST = re.compile(r"[0-9a-f]{64}")


class TransferError(Exception):
    """The transfer cannot go on; one sentence."""


class NoRoomError(TransferError):
    """The disk that receives is full, or cannot be written."""


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_part(path: Path, offset: int) -> bytes:
    """At most one part, from `offset` on."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(PART)


class Incoming:
    """A file on its way into `folder`, known by its size and digest beforehand.

    Raises:
        TransferError: the digest is no digest, or the disk has no room for the file.
    """

    def __init__(self, folder: Path, digest: str, size: int) -> None:
        if not _DIGEST.fullmatch(digest) or size < 1:
            raise TransferError("the announced file has no valid name or size")
        self.digest, self.size, self.held = digest, size, 0
        self.path = folder / f"{digest}.safetensors"
        self._partial = folder / f"{digest}.part"
        self._hash = hashlib.sha256()
        if self.path.exists() and self.path.stat().st_size == size:
            self.held = size
            return
        free = shutil.disk_usage(folder).free
        if free < size + SPARE_DISK:
            raise NoRoomError(
                f"the disk is full: {free / 2**20:.0f} MiB are free, {size / 2**20:.1f} MiB are coming and "
                f"{SPARE_DISK / 2**20:.0f} MiB are to stay free"
            )
        self._file = self._partial.open("wb")

    @property
    def complete(self) -> bool:
        return self.held == self.size

    def add(self, offset: int, body: bytes | memoryview) -> int:
        """Take the next part and say how many bytes are held; a part that is not the next one is ignored, so that a
        repeat does no harm.

        Raises:
            TransferError: the disk is full, or the content is not what was announced.
        """
        if self.complete or offset != self.held or not len(body):
            return self.held
        if self.held + len(body) > self.size:
            self.discard()
            raise TransferError("more bytes came than were announced")
        if shutil.disk_usage(self.path.parent).free < SPARE_DISK:  # several files come at once
            self.discard()
            raise NoRoomError("the disk is full")
        try:
            if self._file.closed:  # it was discarded: this is a new beginning
                self._file, self._hash = self._partial.open("wb"), hashlib.sha256()
            self._file.write(body)
            if self.held + len(body) == self.size:
                self._file.close()
        except OSError as error:
            self.discard()
            raise NoRoomError(f"the spool cannot be written ({error.strerror})") from error
        self._hash.update(body)
        self.held += len(body)
        if self.complete:
            if self._hash.hexdigest() != self.digest:
                self.discard()
                raise TransferError("the content is not what was announced (its SHA-256 differs)")
            self._partial.replace(self.path)
        return self.held

    def discard(self) -> None:
        """Forget what came so far; a complete file stays."""
        if not self.path.exists() and hasattr(self, "_file"):
            self._file.close()
            self._partial.unlink(missing_ok=True)
        self.held = self.size if self.path.exists() else 0
