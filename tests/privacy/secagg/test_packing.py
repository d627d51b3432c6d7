"""Packing is exact for every width and length, and refuses what it did not make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import packing
from fedlm.privacy.secagg.packing import add_packed, pack, packed_size, unpack

BITS = st.integers(1, 32)


@given(BITS, st.integers(0, 700), st.integers(0, 2**32 - 1))
def test_back_and_forth(bits: int, length: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(0, 2**bits, length, dtype=np.uint32)
    packed = pack(values, bits)
    assert packed.nbytes == packed_size(length, bits) == (length * bits + 7) // 8
    assert np.array_equal(unpack(packed, length, bits), values)


@pytest.mark.parametrize("bits", range(1, 33))
def test_every_width(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks of 100 columns, whole ones, parts of one and several."""
    monkeypatch.setattr(packing, "LANES", 100)
    for length in (0, 1, 31, 32, 33, 3200, 3205, 3232, 10_001):
        values = np.random.default_rng(bits).integers(0, 2**bits, length, dtype=np.uint32)
        assert np.array_equal(unpack(pack(values, bits), length, bits), values)


def test_more_than_a_block() -> None:
    values = np.random.default_rng(0).integers(0, 2**21, packing.LANES * 32 + 1000, dtype=np.uint32)
    assert np.array_equal(unpack(pack(values, 21), len(values), 21), values)


@given(BITS, st.integers(1, 31), st.integers(0, 2**32 - 1))
def test_less_than_32_are_a_plain_bit_stream(bits: int, length: int, seed: int) -> None:
    """Against Python's integers: the first element in the lowest bits."""
    values = np.random.default_rng(seed).integers(0, 2**bits, length, dtype=np.uint32)
    stream = sum(int(value) << bits * place for place, value in enumerate(values))
    assert pack(values, bits).tobytes() == stream.to_bytes(packed_size(length, bits), "little")


@given(BITS, st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_whole_blocks_are_rows_of_bit_streams(bits: int, columns: int, seed: int) -> None:
    """Against Python's integers, by the layout that the module describes."""
    values = np.random.default_rng(seed).integers(0, 2**bits, 32 * columns, dtype=np.uint32)
    words = pack(values, bits).view("<u4").reshape(bits, columns)
    for column in range(columns):
        stream = sum(int(v) << bits * place for place, v in enumerate(values.reshape(32, columns)[:, column]))
        assert words[:, column].tobytes() == stream.to_bytes(4 * bits, "little")


@given(BITS, st.integers(0, 400), st.integers(0, 2**32 - 1))
def test_adding_is_modulo_the_ring(bits: int, length: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 2**bits, length, dtype=np.uint32) for _ in range(2))
    total = a.copy()
    add_packed(total, pack(b, bits), bits)
    assert np.array_equal(total & np.uint32(2**bits - 1), (a.astype(np.uint64) + b) % 2**bits)


def test_what_is_above_the_ring_does_not_spill() -> None:
    values = np.full(100, 2**32 - 1, np.uint32)
    assert np.array_equal(unpack(pack(values, 5), 100, 5), np.full(100, 31))
    assert values[0] == 2**32 - 1


@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused_before_anything_is_allocated(change: int) -> None:
    with pytest.raises(AggregationRefused, match="elements of 7 bits"):
        unpack(np.zeros(packed_size(100, 7) + change, np.uint8), 100, 7)
    with pytest.raises(AggregationRefused, match="elements of 32 bits"):
        unpack(np.zeros(8, np.uint8), 2**60, 32)


def test_other_refusals() -> None:
    packed = pack(np.arange(10, dtype=np.uint32), 5)
    for data in (packed.astype(np.int8), packed[:, None], np.repeat(packed, 2)[::2]):
        with pytest.raises(AggregationRefused):
            unpack(data, 10, 5)
    with pytest.raises(AggregationRefused, match="beyond its last"):
        unpack(packed | np.uint8(128), 10, 5)
    for bits in (0, 33):
        with pytest.raises(AggregationRefused, match="1 to 32 bits"):
            pack(np.zeros(3, np.uint32), bits)


def test_a_refused_payload_leaves_the_total_as_it_was() -> None:
    total = np.arange(64, dtype=np.uint32)
    with pytest.raises(AggregationRefused):
        add_packed(total, np.zeros(3, np.uint8), 9)
    assert np.array_equal(total, np.arange(64))
