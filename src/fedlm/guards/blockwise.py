"""Numbers in 8 or 4 bits, rounded at random so that they are right on average."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fedlm.errors import UpdateRefused
from fedlm.guards.base import Guard, Parts, Shapes, size_of
from fedlm.guards.cast import checked_peak, power_above
from fedlm.messages import Tensors

STRETCH = 1 << 18
"""About so many values are worked on at a time: 1 MiB, which stays in cache."""


class Int8(Guard):
    """x = s c, with whole numbers c in -L..L and a scale s for each block of `block` values.

    s L is the block's largest magnitude, rounded up to an fp16 share of the update's own peak (a power of two), since
    an update's values are too small for fp16 itself. c is x / s rounded up or down at random so that E[s c] = x
    (stochastic rounding; QSGD, Alistarh et al., NeurIPS 2017, with the block's maximum in place of a norm, as in
    Dettmers et al., ICLR 2022). The error of a value is below s and its variance at most s^2 / 4.

    Whether to round up is decided by 16 random bits, so that a mean is off by less than s 2^-16, and a value below
    s 2^-17 always decodes to 0. No s but that of a block of zeros is below 2^-24 / L of the update's peak: what lies
    below 2^-41 / L of the peak (int8: 2^-48, int4: 2^-43.8) may not survive. L = 127.
    """

    levels = 127
    dtype = torch.int8

    def parts(self, shapes: Shapes) -> Parts:
        size = size_of(shapes)
        blocks, codes = -(-size // self.spec.block), (self.dtype, self._length(size))
        return {"peak": (torch.float32, 1), "scales": (torch.float16, blocks), "codes": codes}

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:  # noqa: ARG002
        peak = power_above(values)
        found = [self._encoded(stretch, peak, random) for stretch in torch.split(values, self._stretch)]
        scales, codes = (torch.cat(parts) for parts in zip(*found, strict=True))
        return values[:0], {"peak": peak, "scales": scales, "codes": codes}

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:  # noqa: ARG002
        peak, scales = checked_peak(parts["peak"]), parts["scales"].float()
        if len(scales) and not 0 <= float(scales.amin()) <= float(scales.amax()) <= 1:
            raise UpdateRefused("the payload's scales are not all between 0 and 1")
        steps, values, block = scales.mul_(peak).div_(self.levels), torch.empty(size_of(shapes)), self.spec.block
        codes = torch.split(parts["codes"], self._length(self._stretch))
        for place, of, packed in zip(
            torch.split(values, self._stretch), torch.split(steps, self._stretch // block), codes, strict=True
        ):
            numbers = pad(self._unpack(packed, len(place)), (0, -len(place) % block)).view(-1, block)
            place.copy_(numbers.mul_(of[:, None]).view(-1)[: len(place)])
        return values

    @property
    def _stretch(self) -> int:
        """Values at a time: whole blocks, and a multiple of four, as random bits are drawn."""
        return 4 * self.spec.block * max(1, STRETCH // (4 * self.spec.block))

    def _encoded(self, values: Tensor, peak: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Scales and codes of one stretch."""
        blocks = pad(values, (0, -len(values) % self.spec.block)).view(-1, self.spec.block)
        scales = rounded_up(blocks.abs().amax(1) / peak)
        inverse = torch.where(scales > 0, self.levels / (scales.float() * peak), 0.0)
        codes = (blocks * inverse[:, None]).view(-1)[: len(values)]
        codes.add_(coins(len(values), random)).floor_().clamp_(-self.levels, self.levels)
        return scales, self._pack(codes)

    def _length(self, size: int) -> int:
        """Of the codes of so many values."""
        return size

    def _pack(self, codes: Tensor) -> Tensor:
        return codes.to(torch.int8)

    def _unpack(self, packed: Tensor, size: int) -> Tensor:  # noqa: ARG002
        return packed.float()


class Int4(Int8):
    """As `Int8` with L = 7: two values in a byte, the first one in its high half. 4.25 bits a value with blocks of 64.

    A half byte has a sixteenth value that no encoder uses; it decodes to 8 s and is as harmless as 7 s.
    """

    levels = 7
    dtype = torch.uint8

    def _length(self, size: int) -> int:
        return -(-size // 2)

    def _pack(self, codes: Tensor) -> Tensor:
        halves = pad(codes.add_(self.levels).to(torch.uint8), (0, len(codes) % 2))
        return (halves[0::2] << 4).bitwise_or_(halves[1::2])

    def _unpack(self, packed: Tensor, size: int) -> Tensor:
        halves = torch.empty(len(packed), 2)
        halves[:, 0], halves[:, 1] = packed >> 4, packed & 15
        return halves.view(-1)[:size].sub_(self.levels)


def rounded_up(shares: Tensor) -> Tensor:
    """The smallest fp16 that is not below each share (in 0..1), so that no value of a block lies beyond its scale."""
    near = shares.to(torch.float16)
    return torch.where(near.float() < shares, (near.view(torch.int16) + 1).view(torch.float16), near)


def coins(count: int, random: np.random.Generator) -> Tensor:
    """Uniform numbers in (0, 1) from 16 random bits each, fp32 [count]."""
    words = random.bit_generator.random_raw(-(-count // 4))
    return torch.from_numpy(words.view(np.uint16)[:count].astype(np.float32)).add_(0.5).mul_(2.0**-16)
