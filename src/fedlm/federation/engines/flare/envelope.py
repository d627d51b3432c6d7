"""What one relay says to another: a JSON header and a run of bytes, in one message of bounded size.

Nothing but JSON is ever decoded from a message, and nothing is allocated from a number that the other side states.
"""

from __future__ import annotations

import json
import struct
from typing import Any

PROTOCOL = 1
"""Version of what relays say to each other; it stands in every message."""

PART = 4 * 2**20
"""Bytes of a tensors file that travel in one message. Small enough that a heartbeat never waits long behind one."""

INLINE = 256 * 2**10
"""Bytes of tensors that travel along with a request or an answer, instead of in parts of their own."""

MAX_HEADER = 32 * 2**20
"""Bytes of a header; as in `lines.MAX_LINE`, the longest carries one number per row."""

MAX_MESSAGE = 4 + MAX_HEADER + PART

Header = dict[str, Any]


class BadMessageError(Exception):
    """The bytes are no message of this protocol."""


def pack(header: Header, body: bytes | memoryview = b"") -> bytes:
    """Raises:
    BadMessageError: the header or the body is over its bound.
    """
    text = json.dumps({"protocol": PROTOCOL, **header}).encode()
    if len(text) > MAX_HEADER or len(body) > PART:
        raise BadMessageError(f"a message of {len(text)} + {len(body)} bytes is over the bound")
    return b"".join((struct.pack(">I", len(text)), text, body))


def unpack(message: bytes | bytearray | memoryview) -> tuple[Header, memoryview]:
    """The header, and a view of the body.

    Raises:
        BadMessageError: see there.
    """
    view = memoryview(message)
    if not 4 <= len(view) <= MAX_MESSAGE:
        raise BadMessageError(f"a message of {len(view)} bytes")
    (length,) = struct.unpack(">I", view[:4])
    if length > MAX_HEADER or 4 + length > len(view) or len(view) - 4 - length > PART:
        raise BadMessageError("the lengths inside a message do not fit it")
    try:
        header = json.loads(bytes(view[4 : 4 + length]))
    except (ValueError, RecursionError):
        raise BadMessageError("the header is not JSON") from None
    if not isinstance(header, dict):
        raise BadMessageError("the header is not an object")
    return header, view[4 + length :]
