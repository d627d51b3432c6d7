"""Only the largest values travel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import UpdateRefused
from fedlm.guards import indices
from fedlm.guards.base import Guard, Parts, Shapes, size_of
from fedlm.messages import Tensors

KEPT = "kept"


class TopK(Guard):
    """The k values of largest magnitude of the whole update (Aji and Heafield, EMNLP 2017; Stich et al., NeurIPS 2018).

    |x - C(x)|^2 <= (1 - k/d) |x|^2: biased, so it wants error feedback. Of equal magnitudes at the border the first
    ones are kept. The indices travel in about 2 + log2(d/k) bits each (`fedlm.guards.indices`).
    """

    def left(self, shapes: Shapes) -> Shapes:
        return {KEPT: torch.Size([kept(self.spec.k, self.spec.density, size_of(shapes))])}

    def parts(self, shapes: Shapes) -> Parts:
        (k,), d = self.left(shapes)[KEPT], size_of(shapes)
        return {"indices": (torch.uint8, indices.packed_size(k, d))}

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:  # noqa: ARG002
        (k,) = self.left(shapes)[KEPT]
        chosen = largest(values, k)
        return values[chosen], {"indices": indices.pack(chosen, len(values))}

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:  # noqa: ARG002
        d = size_of(shapes)
        return torch.zeros(d).index_copy_(0, indices.unpack(parts["indices"], len(left), d), left)


def kept(k: int | None, density: float, d: int) -> int:
    """How many of d values are kept: k, or the share `density`, at least one.

    Raises:
        UpdateRefused: there are not so many.
    """
    count = max(1, round(density * d)) if k is None else k
    if count > d:
        raise UpdateRefused(f"k = {count} values cannot be kept of {d}", fix="lower k, or give a density instead")
    return count


def largest(values: Tensor, k: int) -> Tensor:
    """Increasing indices of the k largest magnitudes, int64 [k].

    The bits of a float without sign are ordered as the floats are. Counting by the upper 16 of them finds the group at
    the border in one sweep; only that group is sorted.
    """
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    groups = magnitudes >> 16
    at_least = torch.bincount(groups, minlength=1 << 15).flip(0).cumsum(0)
    border = (1 << 15) - 1 - int(torch.searchsorted(at_least, k))
    sure = (groups > border).nonzero().view(-1)
    doubtful = (groups == border).nonzero().view(-1)
    order = magnitudes[doubtful].sort(descending=True, stable=True).indices[: k - len(sure)]
    return torch.cat([sure, doubtful[order]]).sort().values
