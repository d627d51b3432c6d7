"""Bounding what one unit contributes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedlm.errors import PrivacyError
from fedlm.messages import Tensors


@dataclass(frozen=True)
class Clipped:
    """What clipping made of an update.

    Args:
        tensors: fp32, of a common L2 norm of at most the bound.
        norm: before.
        within: the update was within the bound and is unchanged.
    """

    tensors: Tensors
    norm: float
    within: bool


def clip(update: Tensors, bound: float) -> Clipped:
    """Scale an update down to an L2 norm of at most `bound`, over all its tensors together.

    Norms are taken in fp64 of the fp32 values that are released, so rounding never lifts one above the bound.

    Raises:
        PrivacyError: the bound is not positive and finite, or the update is not finite or holds whole numbers.
    """
    if not (math.isfinite(bound) and bound > 0):
        raise PrivacyError(f"the clipping bound is {bound}; it must be above 0 and finite")
    for name, tensor in update.items():
        if not tensor.is_floating_point():
            raise PrivacyError(f"'{name}' is {tensor.dtype}: only floating-point numbers can be clipped")
    tensors = {name: tensor.detach().to(torch.float32) for name, tensor in update.items()}
    norm = l2_norm(tensors)
    if not math.isfinite(norm):
        raise PrivacyError("the update is not finite, so nothing bounds it", fix="lower the learning rate")
    if norm <= bound:
        return Clipped(tensors, norm, within=True)
    factor = bound / norm
    scaled = _times(tensors, factor)
    while l2_norm(scaled) > bound:
        factor *= 1 - 2.0**-24
        scaled = _times(tensors, factor)
    return Clipped(scaled, norm, within=False)


def l2_norm(tensors: Tensors) -> float:
    """Over all tensors, in fp64."""
    # math.fsum: exact over tensors, whatever their order.
    return math.sqrt(math.fsum(float(tensor.to(torch.float64).square().sum()) for tensor in tensors.values()))


def _times(tensors: Tensors, factor: float) -> Tensors:
    """In fp64, rounded once."""
    return {name: (tensor.to(torch.float64) * factor).to(torch.float32) for name, tensor in tensors.items()}
