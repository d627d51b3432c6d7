"""Words between an engine and its worker processes: one JSON object per line, tensors in safetensors files beside it.

Nothing is pickled. Lines have a size bound; a tensors file is named by its bare name within the run's spool folder.
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fedlm.errors import RunError
from fedlm.messages import Failure, FailureKind, Reply, Request, Tensors

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
                except ValueError as error:
                    raise ClosedError from error
                if not isinstance(message, dict):
                    raise ClosedError
                return message
            self._scanned = len(self._buffer)
            if self._scanned > MAX_LINE:
                raise ClosedError
            try:
                # Reading alone waits: a timeout on the socket itself would also cut long sends short.
                if timeout is not None and not _readable(self._socket, timeout):
                    return None
                chunk = self._socket.recv(65536)
            except (OSError, ValueError) as error:  # ValueError: closed on this side, by another thread
                raise ClosedError from error
            if not chunk:
                raise ClosedError
            self._buffer += chunk

    def close(self) -> None:
        self._socket.close()


def _readable(connection: socket.socket, timeout: float) -> bool:
    import select

    poll = select.poll()
    poll.register(connection, select.POLLIN | select.POLLHUP)
    return bool(poll.poll(timeout * 1000))


def request_message(job: int, request: Request, tensors_file: str | None) -> Message:
    return {
        "type": "request",
        "job": job,
        "silo": request.silo,
        "verb": request.verb,
        "run": request.run,
        "round": request.round,
        "attempt": request.attempt,
        "fields": request.fields,
        "tensors": tensors_file,
    }


def parse_request(message: Message, tensors: Tensors) -> Request:
    return Request(
        silo=str(message["silo"]),
        verb=str(message["verb"]),
        run=str(message["run"]),
        round=int(message["round"]),
        attempt=int(message["attempt"]),
        tensors=tensors,
        fields=dict(message["fields"]),
    )


def reply_message(job: int, answer: Reply | Failure, tensors_file: str | None) -> Message:
    if isinstance(answer, Failure):
        return {"type": "failure", "job": job, "kind": answer.kind.value, "reason": answer.reason}
    return {"type": "reply", "job": job, "fields": answer.fields, "tensors": tensors_file}


def parse_reply(message: Message, request: Request, tensors: Tensors) -> Reply | Failure:
    """The answer to `request`; identity fields come from the request, so an answer cannot claim another silo."""
    if message["type"] == "failure":
        return Failure(request.silo, FailureKind(message["kind"]), str(message["reason"]))
    fields = dict(message["fields"])
    return Reply(request.silo, request.verb, request.run, request.round, request.attempt, tensors, fields)


def spooled(spool: Path, name: str) -> Path:
    """A file of the spool by its bare name.

    Raises:
        ValueError: the name reaches outside the spool.
    """
    if not name or name != Path(name).name or name.startswith("."):
        raise ValueError("not a bare file name")
    return spool / name


def write_spool(path: Path, tensors: Tensors) -> None:
    """Tensors as safetensors, not flushed to disk: the spool does not outlive the processes that use it."""
    safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)


def serialized_size(tensors: Tensors) -> int:
    """Bytes that `write_spool` writes, computed without writing; 0 for no tensors, since then nothing is sent."""
    if not tensors:
        return 0
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(tensors, key=lambda n: (-_RANK[tensors[n].dtype], n)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return struct.calcsize("<Q") + -(-length // 8) * 8 + at


_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}
