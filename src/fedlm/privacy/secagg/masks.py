"""Masks: a pseudo-random stream of ring elements for each 32-byte key, added and taken away again.

The stream is AES in counter mode, as in Bonawitz et al. (CCS 2017, section 7), with 256-bit keys, read as little-endian
uint32. Each key is derived for one purpose of one attempt and used once, so the counter starts
from 0. Arithmetic is modulo 2^32, of which every smaller ring 2^r is an image; `reduce` goes there.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.message import Words

BLOCK = 1 << 15
"""Elements at a time: the stream stays in a core's cache until it is added."""

_ZEROS = bytes(4 * BLOCK)


def add_mask(total: Words, key: bytes) -> None:
    """Add a key's mask to a total, uint32 [n], in place and modulo 2^32."""
    _apply(total, key, np.add)


def subtract_mask(total: Words, key: bytes) -> None:
    """Take a key's mask away again."""
    _apply(total, key, np.subtract)


def reduce(total: Words, bits: int) -> None:
    """Modulo 2^bits, in place."""
    total &= np.uint32(2**bits - 1)


def _apply(total: Words, key: bytes, operation: np.ufunc) -> None:
    if len(key) != 32:
        raise AggregationRefused(f"a mask's key has 32 bytes, not {len(key)}")
    stream = Cipher(AES256(key), CTR(bytes(16))).encryptor()
    buffer = bytearray(4 * BLOCK + 15)  # the cipher wants room for one block more
    mask, zeros = np.frombuffer(buffer, "<u4", BLOCK), memoryview(_ZEROS)
    for start in range(0, len(total), BLOCK):
        part = total[start : start + BLOCK]
        stream.update_into(zeros[: 4 * len(part)], buffer)
        operation(part, mask[: len(part)], out=part)
