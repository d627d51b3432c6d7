"""Where a sparse vector has its values, in about as few bits as there are choices.

k of d increasing indices take k (2 + log2(d/k)) bits or less (Elias, 1974; Fano, 1971), while log2(d choose k) is about
k (1.44 + log2(d/k)). Each index is cut into its l = floor(log2(d/k)) low bits, which are written as they are, and the
rest, which does not decrease and is written as a bit field: bit (high + i) stands for the i-th index.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import UpdateRefused


def packed_size(k: int, d: int) -> int:
    """Bytes that k of d indices take."""
    low = low_bits(k, d)
    return -(-k * low // 8) + -(-(k + ((d - 1) >> low) + 1) // 8)


def low_bits(k: int, d: int) -> int:
    return (d // k).bit_length() - 1


def pack(indices: Tensor, d: int) -> Tensor:
    """Strictly increasing indices below d, int64 [k], as uint8 [packed_size(k, d)]."""
    k, found = len(indices), indices.numpy()
    low = low_bits(k, d)
    field = np.zeros(k + ((d - 1) >> low) + 1, dtype=np.uint8)
    field[(found >> low) + np.arange(k)] = 1
    bits = (found[:, None] >> np.arange(low)[::-1]).astype(np.uint8) & 1
    return torch.from_numpy(np.concatenate([np.packbits(bits.reshape(-1)), np.packbits(field)]))


def unpack(packed: Tensor, k: int, d: int) -> Tensor:
    """The indices, int64 [k].

    Args:
        packed: uint8 [packed_size(k, d)], of any content.

    Raises:
        UpdateRefused: they are not k strictly increasing indices below d.
    """
    low = low_bits(k, d)
    data, split = packed.numpy(), -(-k * low // 8)
    (places,) = np.nonzero(np.unpackbits(data[split:]))
    if len(places) != k:
        raise UpdateRefused(f"the payload has {len(places)} indices, not {k}")
    bits = np.unpackbits(data[:split], count=k * low).reshape(k, low).astype(np.int64)
    indices = ((places - np.arange(k)) << low) | (bits << np.arange(low)[::-1]).sum(1)
    if k and (indices[-1] >= d or (np.diff(indices) <= 0).any()):
        raise UpdateRefused(f"the payload's indices are not increasing, or not below {d}")
    return torch.from_numpy(indices)
