"""Requests and replies as JSON messages between processes on one machine; their tensors lie in safetensors files.

Nothing is pickled. A tensors file is named by its bare name within the run's spool folder.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from fedlm.federation.engines.lazy import DTYPES
from fedlm.federation.engines.lines import Message
from fedlm.messages import Failure, FailureKind, Reply, Request, Tensors


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


def parse_reply(message: Message, request: Request, tensors: Mapping[str, torch.Tensor]) -> Reply | Failure:
    """The answer to `request`; identity fields come from the request, so an answer cannot claim another silo."""
    if message["type"] == "failure":
        return Failure(request.silo, FailureKind(message["kind"]), str(message["reason"]))
    fields = dict(message["fields"])
    return Reply(request.silo, request.verb, request.run, request.round, request.attempt, tensors, fields)


def write_spool(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Tensors as safetensors, not flushed to disk: the spool does not outlive the processes that use it."""
    safetensors.torch.save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path)


def serialized_size(tensors: Mapping[str, torch.Tensor]) -> int:
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


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}
