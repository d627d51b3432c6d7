"""A Unix socket that carries one JSON object per line: words between processes on one machine.

Imports no torch: relays between organisations speak it too. Nothing is pickled, and lines have a size bound.
"""

from __future__ import annotations

import json
import select
import socket
import threading
from pathlib import Path
from typing import Any

from fedlm.errors import RunError

MAX_LINE = 32 * 2**20
"""Bytes of one line. The longest is a reply to `evaluate` with one number per row."""

Message = dict[str, Any]


class ClosedError(Exception):
    """The other side is gone."""


class Lines:
    """A Unix socket that carries one JSON object per line. Sending is safe from several threads; one thread reads."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._buffer = bytearray()
        self._scanned = 0
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises:
        ClosedError: the other side is gone.
        RunError: the message is over the size bound.
        """
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise RunError(
                f"a message of {len(line)} bytes is over the bound of {MAX_LINE}", fix="lower evaluation.max_examples"
            )
        with self._lock:
            try:
                self._socket.sendall(line)
            except OSError as error:
                raise ClosedError from error

    def receive(self, timeout: float | None = None) -> Message | None:
        """The next message, or None when `timeout` seconds pass first.

        Raises:
            ClosedError: the other side is gone, or does not keep to the protocol.
        """
        while True:
            end = self._buffer.find(b"\n", self._scanned)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                self._scanned = 0
                try:
                    message = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ClosedError from error
                if not isinstance(message, dict):
                    raise ClosedError
                return message
            self._scanned = len(self._buffer)
            if self._scanned > MAX_LINE:
                raise ClosedError
            try:
                # Reading alone waits: a timeout on the socket itself would also cut long sends short.
                if timeout is not None and not readable(self._socket, timeout):
                    return None
                chunk = self._socket.recv(65536)
            except (OSError, ValueError) as error:  # ValueError: closed on this side, by another thread
                raise ClosedError from error
            if not chunk:
                raise ClosedError
            self._buffer += chunk

    def close(self) -> None:
        self._socket.close()


def readable(connection: socket.socket, timeout: float) -> bool:
    """Whether there is something to read, or the other side is gone, within `timeout` seconds."""
    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(timeout * 1000))


def spooled(spool: Path, name: str) -> Path:
    """A file of the spool by its bare name.

    Raises:
        ValueError: the name reaches outside the spool, or is none.
    """
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable() or len(name) > 200:
        raise ValueError("not a bare file name")
    return spool / name
