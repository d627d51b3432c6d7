"""Public text on its way to a silo: UTF-8 JSON in a tensor, so that no log or error of an engine shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedlm.errors import DataError

NAME = "text"


def pack_text(value: Any) -> dict[str, torch.Tensor]:
    """Plain JSON as {"text": uint8 [bytes]}."""
    return {NAME: torch.from_numpy(np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8).copy())}


def unpack_text(tensors: Mapping[str, torch.Tensor], most: int) -> Any:
    """What `pack_text` packed.

    Args:
        most: bytes; more are not even read.

    Raises:
        DataError: there is no text, too much of it, or it is no JSON.
    """
    found = tensors.get(NAME)
    if found is None or found.dtype is not torch.uint8 or found.ndim != 1:
        raise DataError("the request holds no text")
    if found.numel() > most:
        raise DataError(f"the request's text has {found.numel()} bytes, above {most}")
    try:
        return json.loads(found.numpy().tobytes().decode())
    except (ValueError, RecursionError):
        raise DataError("the request's text is no JSON") from None
