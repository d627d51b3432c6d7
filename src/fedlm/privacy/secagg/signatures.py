"""Signatures of several silos in one message: end to end, with their sizes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.message import Bytes, Message, from_bytes, octets


def join_signatures(signatures: Sequence[bytes]) -> tuple[Bytes, list[int]]:
    """Array `signatures` and field `sizes`."""
    return from_bytes(b"".join(signatures)), [len(signature) for signature in signatures]


def split_signatures(message: Message, count: int, longest: int) -> list[bytes]:
    """Raises AggregationRefused: sizes and bytes are not those of so many signatures."""
    sizes, data = message.fields["sizes"], octets(message, "signatures", -1)
    fits = isinstance(sizes, list) and len(sizes) == count
    if not fits or not all(type(size) is int and 0 < size <= longest for size in sizes) or sum(sizes) != len(data):
        raise AggregationRefused(f"the signatures are not {count} of the sizes given")
    return [data[end - size : end].tobytes() for size, end in zip(sizes, np.cumsum(sizes).tolist(), strict=True)]
