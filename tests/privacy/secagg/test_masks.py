"""Mask streams: the cipher's own, added and taken away exactly."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.masks import BLOCK, add_mask, reduce, subtract_mask

KEY = bytes(range(32))


@pytest.mark.parametrize("length", [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_the_stream_is_aes_in_counter_mode(length: int) -> None:
    total = np.zeros(length, np.uint32)
    add_mask(total, KEY)
    stream = Cipher(AES256(KEY), CTR(bytes(16))).encryptor().update(bytes(4 * length))
    assert total.astype("<u4").tobytes() == stream


def test_the_stream_is_nists_aes_256() -> None:
    """FIPS 197, appendix C.3 encrypts 00112233...: here the counter block 0 under that appendix's key, by ECB."""
    from cryptography.hazmat.primitives.ciphers.modes import ECB

    ecb = Cipher(AES256(KEY), ECB()).encryptor()
    assert ecb.update(bytes.fromhex("00112233445566778899aabbccddeeff")).hex() == "8ea2b7ca516745bfeafc49904b496089"
    total = np.zeros(8, np.uint32)
    add_mask(total, KEY)
    assert total.astype("<u4").tobytes() == ecb.update(bytes(16)) + ecb.update(bytes(15) + b"\1")


def test_what_is_added_is_taken_away() -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 2 * BLOCK + 3, dtype=np.uint32)
    total = values.copy()
    add_mask(total, KEY)
    assert (total != values).mean() > 0.999
    subtract_mask(total, KEY)
    assert np.array_equal(total, values)


@pytest.mark.parametrize("bits", [2, 9, 32])
def test_a_smaller_ring_is_an_image(bits: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**bits, 1000, dtype=np.uint32)
    total = values.copy()
    add_mask(total, KEY)
    reduce(total, bits)
    assert total.max() < 2**bits
    subtract_mask(total, KEY)
    reduce(total, bits)
    assert np.array_equal(total, values)


def test_keys_of_another_size() -> None:
    with pytest.raises(AggregationRefused, match="32 bytes"):
        add_mask(np.zeros(3, np.uint32), KEY[:16])
