"""Quantisation under the mask: exact where it can be, unbiased elsewhere, never beyond the ring."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.errors import RunError, UpdateRefused
from fedlm.privacy.secagg import Encoding, decode, encode
from fedlm.privacy.secagg.quantise import BLOCK


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.integers(2, 16), st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_integers_are_summed_exactly(bits: int, silos: int, cap: int, seed: int) -> None:
    """With a step of 1 there is nothing to round: the mean times the weights is the integers' weighted sum."""
    levels = 2 ** (bits - 1) - 1
    encoding, random = Encoding(levels, bits, cap, silos), generator(seed)
    values = random.integers(-levels, levels + 1, (silos, 9)).astype(np.float64)
    weights = random.integers(1, cap + 1, silos)
    ring = [encode(v, int(w), encoding, random)[0] for v, w in zip(values, weights, strict=True)]
    total = np.sum(ring, axis=0, dtype=np.uint64)
    assert total.max() < 2**encoding.ring_bits
    mean, weight = decode(total.astype(np.uint32), silos, encoding)
    assert weight == weights.sum()
    assert np.array_equal(np.round(mean * weight), weights @ values)
    assert np.abs(mean * weight - weights @ values).max() < 1e-6


def test_rounding_is_unbiased() -> None:
    """The mean of 40,000 roundings of each value, within 5 standard errors (of at most half a step)."""
    encoding = Encoding(scale=1.0, bits=4, largest_weight=1, silos=1)
    values = np.array([-1.0, -0.99, -0.3, 0.0, 0.07, 0.5, 1.0])
    ring, _ = encode(np.tile(values, 40_000), 1, encoding, generator())
    means = (ring[:-1].astype(np.float64) - encoding.levels).reshape(40_000, -1).mean(0) / encoding.levels
    assert np.abs(means - values).max() < 5 * 0.5 / encoding.levels / 200
    assert means[0] == -1 and means[3] == 0 and means[6] == 1


def test_errors_stay_below_a_step_and_clipping_is_counted() -> None:
    encoding = Encoding(scale=0.25, bits=12, largest_weight=9, silos=1)
    values = generator().uniform(-0.5, 0.5, BLOCK + 100).astype(np.float32)
    ring, clipped = encode(values, 7, encoding, generator(1))
    mean, weight = decode(ring, 1, encoding)
    assert weight == 7
    assert clipped == int((np.abs(values) > np.float32(0.25)).sum())
    assert np.abs(mean - np.clip(values, -0.25, 0.25)).max() < 0.25 / encoding.levels


def test_largest_values_and_weights_do_not_wrap_around() -> None:
    encoding = Encoding(scale=1.0, bits=20, largest_weight=1, silos=4096)
    assert encoding.ring_bits == 32
    ring, _ = encode(np.ones(3), 1, encoding, generator())
    assert int(ring[0]) * 4096 < 2**32
    mean, _ = decode(ring * np.uint32(4096), 4096, encoding)
    assert np.array_equal(mean, np.ones(3))


@pytest.mark.parametrize(
    ("bits", "cap", "silos", "ring"),
    [(16, 1, 100, 23), (8, 1000, 10, 22), (16, 3, 1, 18), (2, 1, 1, 2), (16, 1, 128, 23)],
)
def test_ring_bits(bits: int, cap: int, silos: int, ring: int) -> None:
    assert Encoding(1.0, bits, cap, silos).ring_bits == ring


def test_a_sum_without_room_is_refused_with_what_to_do() -> None:
    with pytest.raises(RunError, match=r"33 bits.*quantise to 15 bits or let no weight be above 655") as error:
        Encoding(1.0, 16, 1000, 100)
    assert Encoding(1.0, 15, 1000, 100).ring_bits == 32 and Encoding(1.0, 16, 655, 100).ring_bits == 32
    assert error.value.fix
    with pytest.raises(RunError, match="fewer silos"):
        Encoding(1.0, 24, 10**9, 10**9)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": 0.0},
        {"scale": float("inf")},
        {"scale": float("nan")},
        {"bits": 1},
        {"bits": 25},
        {"largest_weight": 0},
    ],
)
def test_refused_encodings(wrong: dict[str, float]) -> None:
    with pytest.raises(RunError):
        Encoding(**{"scale": 1.0, "bits": 8, "largest_weight": 5, "silos": 3, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [0, -1, 6])
def test_refused_weights(weight: int) -> None:
    with pytest.raises(UpdateRefused, match="not from 1 to 5"):
        encode(np.zeros(3), weight, Encoding(1.0, 8, 5, 3), generator())


@pytest.mark.parametrize("values", [np.array([np.nan]), np.array([np.inf]), np.zeros(3, int), np.zeros((2, 2))])
def test_refused_values(values: np.ndarray) -> None:
    with pytest.raises(UpdateRefused):
        encode(values, 1, Encoding(1.0, 8, 5, 3), generator())


def test_a_sum_out_of_range_is_found() -> None:
    encoding = Encoding(1.0, 8, 5, 3)
    honest = sum(encode(np.zeros(4), w, encoding, generator())[0] for w in (1, 5, 2))
    decode(honest, 3, encoding)
    for place, value, says in (
        (-1, 2, "weights' sum is 2"),
        (-1, 16, "weights' sum is 16"),
        (0, 8 * 254 + 1, "a sum is"),
    ):
        wrong = honest.copy()
        wrong[place] = value
        with pytest.raises(RunError, match=says):
            decode(wrong, 3, encoding)
    with pytest.raises(RunError, match="out of range"):  # as after a mask that is still on
        decode(generator().integers(0, 2**encoding.ring_bits, 100, dtype=np.uint32), 3, encoding)
