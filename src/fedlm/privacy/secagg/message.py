"""What silo and coordinator send each other: arrays and plain JSON, and strict reading of either."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import AggregationRefused
from fedlm.messages import Fields

Words = NDArray[np.uint32]
"""Ring elements, uint32 [n]."""

Bytes = NDArray[np.uint8]

NAME = 256
"""Longest name of a run or silo, in characters."""


class Message(NamedTuple):
    """One request or reply."""

    arrays: dict[str, NDArray[Any]]
    fields: Fields


def joined(*parts: str | int | bytes) -> bytes:
    """Parts as bytes that no other parts give: each with its type and length before it. What is signed, hashed or bound
    to a key goes through here."""
    out = bytearray()
    for part in parts:
        kind, data = (
            (b"s", part.encode())
            if isinstance(part, str)
            else (b"i", str(part).encode())
            if isinstance(part, int)
            else (b"b", bytes(part))
        )
        out += kind + len(data).to_bytes(8, "big") + data
    return bytes(out)


def canonical(fields: Any) -> bytes:
    """Plain JSON in one spelling.

    Raises:
        AggregationRefused: it is not plain JSON.
    """
    try:
        return json.dumps(fields, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        raise AggregationRefused("the message's fields are not plain JSON") from None


def digest(message: Message) -> bytes:
    """SHA-256 of all that a message says.

    Raises:
        AggregationRefused: it is not arrays of plain numbers and plain JSON.
    """
    check_shape(message)
    hashed = hashlib.sha256(canonical(message.fields))
    for name in sorted(message.arrays):
        array = message.arrays[name]
        hashed.update(joined(name, array.dtype.str, *array.shape))
        hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.digest()


def check_shape(message: Any) -> None:
    """Raises AggregationRefused: this is not arrays of whole numbers by name and fields by name."""
    if not (isinstance(message, Message) and isinstance(message.arrays, dict) and isinstance(message.fields, dict)):
        raise AggregationRefused("a message is arrays and fields")
    arrays, fields = message
    if not all(isinstance(name, str) and name.isprintable() for name in (*arrays, *fields)):
        raise AggregationRefused("the message's names are not all printable text")
    if not all(isinstance(array, np.ndarray) and array.dtype.kind in "uif" for array in arrays.values()):
        raise AggregationRefused("the message holds what is no array of numbers")


def only(message: Message, arrays: Collection[str] = (), fields: Collection[str] = ()) -> None:
    """Raises AggregationRefused: the message has other arrays or fields than these."""
    check_shape(message)
    for kind, has, wanted in (("arrays", message.arrays, arrays), ("fields", message.fields, fields)):
        if set(has) != set(wanted):
            raise AggregationRefused(f"the message's {kind} are not {sorted(wanted)}")


def octets(message: Message, name: str, *shape: int) -> Bytes:
    """An array of bytes of this shape; -1 takes any length.

    Raises:
        AggregationRefused: it is anything else.
    """
    array: Bytes = message.arrays[name]
    fits = array.ndim == len(shape) and all(want in (-1, has) for want, has in zip(shape, array.shape, strict=True))
    if array.dtype != np.uint8 or not fits:
        raise AggregationRefused(f"'{name}' is not uint8 {list(shape)}")
    return array


def names(message: Message, field: str, known: Collection[str]) -> tuple[str, ...]:
    """A list of silos.

    Raises:
        AggregationRefused: not a list of known names in sorted order, each once.
    """
    found = message.fields[field]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise AggregationRefused(f"'{field}' is not a list of silos")
    if any(a >= b for a, b in pairwise(found)):
        raise AggregationRefused(f"'{field}' is not in order, or names a silo twice")
    if not set(found) <= set(known):
        raise AggregationRefused(f"'{field}' names silos that do not take part")
    return tuple(found)


def integer(fields: Fields, name: str, low: int, high: int) -> int:
    """Raises AggregationRefused: it is not a whole number within these bounds."""
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise AggregationRefused(f"'{name}' is not a whole number from {low} to {high}")
    return value


def text(fields: Fields, name: str) -> str:
    """Raises AggregationRefused: it is not text, empty or too long."""
    value = fields[name]
    if not isinstance(value, str) or not 0 < len(value) <= NAME or not value.isprintable():
        raise AggregationRefused(f"'{name}' is not printable text of 1 to {NAME} characters")
    return value


def hexadecimal(fields: Fields, name: str, size: int) -> bytes:
    """Raises AggregationRefused: it is not so many bytes in lower-case hexadecimal."""
    value = fields[name]
    if not isinstance(value, str) or len(value) != 2 * size or set(value) - set("0123456789abcdef"):
        raise AggregationRefused(f"'{name}' is not {size} bytes in hexadecimal")
    return bytes.fromhex(value)


def from_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8).copy()


def to_fields(message: Message) -> Fields:
    """A small message as plain JSON, to be kept; `from_fields` reads it back."""
    arrays = {
        name: [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]
        for name, array in message.arrays.items()
    }
    return {"arrays": arrays, "fields": message.fields}


def from_fields(kept: Fields) -> Message:
    arrays = {
        name: np.frombuffer(base64.b64decode(data, validate=True), dtype).reshape(shape).copy()
        for name, (dtype, shape, data) in kept["arrays"].items()
    }
    return Message(arrays, kept["fields"])
