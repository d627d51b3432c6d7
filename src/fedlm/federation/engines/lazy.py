"""A large update as a file: its tensors are read when asked for, one at a time, and never all held in memory."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedlm.files import read_tensors

LARGEST_HEADER = 8 * 2**20
"""Bytes of a safetensors header, which takes ten to twenty times as many when it is read: tens of thousands of tensors.
A silo may lie about it."""

LONGEST_NAME, MOST_SIZES = 1000, 16
"""Characters of a tensor's name, and numbers in its shape."""

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


Part = tuple[torch.dtype, list[int], int, int]
"""A tensor's type, shape, place in the file and size there in bytes."""


class FileTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, by name. Each access reads that tensor anew from the file.

    The file belongs to this object and is removed with it.

    Raises:
        ValueError: the file is no safetensors file, or its parts do not fit it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes = path, path.stat().st_size
        self._parts = parts_of(path)
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


def checked_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file from elsewhere, read at once.

    Raises:
        ValueError: as `parts_of`, or the library does not take it for such a file.
        FileNotFoundError: there is none.
    """
    parts_of(path)
    try:
        return read_tensors(path)
    except SafetensorError:
        raise ValueError("not a safetensors file") from None


def parts_of(path: Path) -> dict[str, Part]:
    """What a safetensors file says of its tensors, if an honest writer can have written it: known types, shapes that
    fit their places, places end to end that fill the file, and every name once.

    Raises:
        ValueError: it is no such file.
        FileNotFoundError: there is none.
    """
    size, parts = path.stat().st_size, dict[str, Part]()
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(LARGEST_HEADER, size - 8):
                raise ValueError("the header does not fit the file")
            header = json.loads(file.read(length), object_pairs_hook=_once)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        for name, about in header.items():
            if len(name) > LONGEST_NAME or any(ord(c) < 32 for c in name):
                raise ValueError("a tensor's name is none")
            parts[name] = _part(about, 8 + length, size)
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(f"not a safetensors file ({type(error).__name__})") from None
    _check_filled(parts.values(), 8 + length, size)
    return parts


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names differ. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found


def _check_filled(parts: Iterable[Part], start: int, end: int) -> None:
    """Tensors lie end to end and fill the file, as every honest writer leaves them. Raises ValueError."""
    for _, _, place, size in sorted(parts, key=lambda part: part[2:]):
        if place != start:
            raise ValueError("tensors lie on one another, or leave gaps")
        start += size
    if start != end:
        raise ValueError("the file has bytes that belong to no tensor")


def _part(about: Any, data: int, end: int) -> Part:
    """Type, shape, place and size of one tensor. Raises ValueError and others."""
    if about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor of which something else is said")
    dtype, shape = DTYPES[about["dtype"]], list(about["shape"])
    start, stop = about["data_offsets"]
    if len(shape) > MOST_SIZES or not all(type(n) is int for n in (*shape, start, stop)):
        raise ValueError("a shape or place that is no list of whole numbers")
    count, extent = 1, dtype.itemsize
    for n in shape:
        if not 0 <= n < 2**63:
            raise ValueError("a size that no tensor has")
        count *= n
        extent *= max(n, 1)
    if extent >= 2**63:  # possible without a byte of content, where another size is 0
        raise ValueError("a shape that no tensor has")
    if not 0 <= start <= stop <= end - data or stop - start != count * dtype.itemsize:
        raise ValueError("a tensor's place does not fit its shape or the file")
    return dtype, shape, data + start, stop - start
