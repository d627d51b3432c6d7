"""Ring elements of r bits as bytes, without gaps.

n elements take ceil(n r / 8) bytes. The first 32 L of them (L = floor(n / 32)) are seen as 32 rows of L, and each
column of 32 elements becomes r words of 32 bits, little-endian, the first element in the lowest bits. Words are stored
in r rows of L: every step works on whole rows, which a processor does many at a time. The up to 31 elements left are
one bit stream of their own, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.message import Bytes, Words

LANES = 1 << 15
"""Columns at a time: large enough that calls cost little beside the work, small enough that a row stays in cache."""


def packed_size(length: int, bits: int) -> int:
    """Bytes that so many elements of 1 to 32 bits take."""
    return -(-length * bits // 8)


def pack(values: Words, bits: int) -> Bytes:
    """The lowest `bits` bits of each element, uint8 [packed_size]. The input, uint32 [n], is not changed."""
    _check(bits)
    length = len(values)
    packed = np.zeros(packed_size(length, bits), np.uint8)
    columns = length // 32
    if columns:
        words = packed[: columns * bits * 4].view("<u4").reshape(bits, columns)
        _pack(values[: columns * 32].reshape(32, columns), words, bits)
    if length % 32:
        padded, words = np.zeros((32, 1), np.uint32), np.zeros((bits, 1), np.dtype("<u4"))
        padded[: length % 32, 0] = values[columns * 32 :]
        _pack(padded, words, bits)
        packed[columns * bits * 4 :] = words.reshape(-1).view(np.uint8)[: packed_size(length % 32, bits)]
    return packed


def unpack(packed: Bytes, length: int, bits: int) -> Words:
    """The elements, uint32 [length].

    Args:
        packed: uint8 of any length and content.

    Raises:
        AggregationRefused: it is not as long as `packed_size` says, or the last byte's unused bits are set.
    """
    check_packed(packed, length, bits)
    values = np.zeros(length, np.uint32)
    add_packed(values, packed, bits)
    values &= np.uint32(2**bits - 1)
    return values


def add_packed(total: Words, packed: Bytes, bits: int) -> None:
    """Add packed elements to a total, uint32 [n], in place and modulo 2^bits: bits above those mean nothing after it.

    Raises:
        AggregationRefused: as `unpack`, before the total is touched.
    """
    check_packed(packed, len(total), bits)
    columns = len(total) // 32
    if columns:
        words = packed[: columns * bits * 4].view("<u4").reshape(bits, columns)
        _add(words, total[: columns * 32].reshape(32, columns), bits)
    if left := len(total) % 32:
        whole, padded = np.zeros(bits * 4, np.uint8), np.zeros((32, 1), np.uint32)
        whole[: packed_size(left, bits)] = packed[columns * bits * 4 :]
        _add(whole.view("<u4").reshape(bits, 1), padded, bits)
        total[columns * 32 :] += padded[:left, 0]


def check_packed(packed: Bytes, length: int, bits: int) -> None:
    """Raises AggregationRefused: these bytes are not so many elements of so many bits."""
    _check(bits)
    if packed.dtype != np.uint8 or packed.shape != (packed_size(length, bits),):
        raise AggregationRefused(
            f"the payload is {packed.dtype} {list(packed.shape)}; {length} elements of {bits} bits are uint8 "
            f"[{packed_size(length, bits)}]"
        )
    if not packed.flags.c_contiguous:
        raise AggregationRefused("the payload's bytes do not lie one after the other")
    if (used := length * bits % 8) and int(packed[-1]) >> used:
        raise AggregationRefused("the payload's last byte has bits beyond its last element")


def _check(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise AggregationRefused(f"a ring has 1 to 32 bits, not {bits}")


def _steps(bits: int) -> Iterator[tuple[int, int, int, bool]]:
    """Of each of 32 elements: its number, its word, its lowest bit's place there, and whether the next has the rest."""
    for element in range(32):
        word, shift = divmod(element * bits, 32)
        yield element, word, shift, shift + bits > 32


def _pack(values: Words, words: Words, bits: int) -> None:
    mask, kept, moved = np.uint32(2**bits - 1), np.empty(LANES, np.uint32), np.empty(LANES, np.uint32)
    for start in range(0, values.shape[1], LANES):
        part = slice(start, start + LANES)
        for element, word, shift, more in _steps(bits):
            source = values[element, part]
            low, high = kept[: len(source)], moved[: len(source)]
            np.bitwise_and(source, mask, out=low)
            target = words[word, part]
            if shift:
                np.left_shift(low, np.uint32(shift), out=high)
                np.bitwise_or(target, high, out=target)
            else:
                target[:] = low
            if more:
                np.right_shift(low, np.uint32(32 - shift), out=words[word + 1, part])


def _add(words: Words, total: Words, bits: int) -> None:
    low, high = np.empty(LANES, np.uint32), np.empty(LANES, np.uint32)
    for start in range(0, total.shape[1], LANES):
        part = slice(start, start + LANES)
        for element, word, shift, more in _steps(bits):
            target = total[element, part]
            found, rest = low[: len(target)], high[: len(target)]
            np.right_shift(words[word, part], np.uint32(shift), out=found)
            if more:
                np.left_shift(words[word + 1, part], np.uint32(32 - shift), out=rest)
                np.bitwise_or(found, rest, out=found)
            np.add(target, found, out=target)
