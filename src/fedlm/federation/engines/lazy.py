"""A large update as a file: its tensors are read when asked for, one at a time, and never all held in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGEST_HEADER = 64 * 2**20
"""Bytes of a safetensors header; a silo may lie about it."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, by name. Each access reads that tensor anew from the file.

    The file belongs to this object and is removed with it.

    Raises:
        ValueError: the file is no safetensors file, or its parts do not fit it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes = path, path.stat().st_size
        self._parts: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= min(LARGEST_HEADER, self.nbytes - 8):
                    raise ValueError("the header does not fit the file")
                header = json.loads(file.read(length))
            for name, about in header.items():
                if name != "__metadata__":
                    self._parts[str(name)] = _part(about, 8 + length, self.nbytes)
        except (KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"not a safetensors file ({type(error).__name__})") from None
        weakref.finalize(self, path.unlink, missing_ok=True)

    def __getitem__(self, name: str) -> Tensor:
        dtype, shape, start, size = self._parts[name]
        buffer = bytearray(size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            if size and file.readinto(buffer) != size:
                raise ValueError("the file is shorter than it says")
        return torch.frombuffer(buffer, dtype=dtype).view(shape) if size else torch.empty(shape, dtype=dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _part(about: Any, data: int, end: int) -> tuple[torch.dtype, list[int], int, int]:
    """Type, shape, place and size of one tensor. Raises ValueError and others."""
    dtype, shape = DTYPES[about["dtype"]], [int(n) for n in about["shape"]]
    start, stop = (int(n) for n in about["data_offsets"])
    count, extent = 1, dtype.itemsize
    for n in shape:
        if n < 0:
            raise ValueError("a negative size")
        count *= n
        extent *= max(n, 1)
    if extent >= 2**63:  # possible without a byte of content, where another size is 0
        raise ValueError("a shape that no tensor has")
    if not 0 <= start <= stop <= end - data or stop - start != count * dtype.itemsize:
        raise ValueError("a tensor's place does not fit its shape or the file")
    return dtype, shape, data + start, stop - start
