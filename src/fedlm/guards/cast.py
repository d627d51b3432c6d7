"""Numbers in 16 bits: bf16 and fp16."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import UpdateRefused
from fedlm.guards.base import LARGEST, Guard, Parts, Shapes, magnitude, size_of
from fedlm.messages import Tensors

SMALLEST = -90
"""Binary exponent below which values count as if the largest had it: nothing divided by it overflows."""


class BFloat16(Guard):
    """Rounded to the nearest bf16: 8 bits of precision, fp32's range."""

    def parts(self, shapes: Shapes) -> Parts:
        return {"values": (torch.bfloat16, size_of(shapes))}

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:  # noqa: ARG002
        return values[:0], {"values": values.to(torch.bfloat16)}

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:  # noqa: ARG002
        return parts["values"].to(torch.float32)


class Float16(Guard):
    """Rounded to the nearest fp16 after division by a power of two above the largest: 11 bits of precision down to
    2^-14 of it, fewer below; below 2^-25 of it, 0. Undivided, an update's values would lie where fp16 has no precision
    left."""

    def parts(self, shapes: Shapes) -> Parts:
        return {"peak": (torch.float32, 1), "values": (torch.float16, size_of(shapes))}

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:  # noqa: ARG002
        peak = power_above(values)
        return values[:0], {"peak": peak, "values": (values / peak).to(torch.float16)}

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:  # noqa: ARG002
        peak, values = checked_peak(parts["peak"]), parts["values"].to(torch.float32)
        if not magnitude(values) <= 1:
            raise UpdateRefused("the payload's fp16 values are above its peak or not finite")
        return values.mul_(peak)


def power_above(values: Tensor) -> Tensor:
    """The smallest power of two above every magnitude, fp32 [1]; within what fp32 can be divided by."""
    return torch.tensor([2.0 ** max(int(np.frexp(magnitude(values))[1]), SMALLEST)])


def checked_peak(peak: Tensor) -> float:
    """Raises UpdateRefused: it is not what `power_above` gives."""
    mantissa, _ = np.frexp(float(peak))
    if mantissa != 0.5 or not 2.0**SMALLEST <= float(peak) <= 2 * LARGEST:
        raise UpdateRefused(f"the payload's peak is {float(peak):g}, not a power of two within bounds")
    return float(peak)
