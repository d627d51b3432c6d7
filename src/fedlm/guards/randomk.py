"""Values at places drawn at random, which both ends know."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlm.guards.base import Guard, Parts, Shapes, size_of
from fedlm.guards.topk import KEPT, kept
from fedlm.messages import Tensors


class RandomK(Guard):
    """k of d values at random places, drawn from the shared seed, so that only values travel (Konečný et al., 2016,
    'random mask'; Stich et al., NeurIPS 2018).

    The vector is cut into k stretches of d/k values (as even as can be) and one place is drawn in each: as likely for
    every place as k draws without replacement, with the same bounds, and k draws instead of d. Multiplied by the length
    of its stretch a value is right on average, with E |C(x) - x|^2 = (d/k - 1) |x|^2. With error feedback it is sent
    as it is: E |C(x) - x|^2 = (1 - k/d) |x|^2.
    """

    def left(self, shapes: Shapes) -> Shapes:
        return {KEPT: torch.Size([kept(self.spec.k, self.spec.density, size_of(shapes))])}

    def parts(self, shapes: Shapes) -> Parts:  # noqa: ARG002
        return {}

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:
        chosen, lengths = self._drawn(shapes, random)
        return values[chosen] * lengths if self.unbiased else values[chosen], {}

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:  # noqa: ARG002
        chosen, _ = self._drawn(shapes, random)
        return torch.zeros(size_of(shapes)).index_copy_(0, chosen, left)

    def _drawn(self, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """The places, int64 [k], and how long their stretches are, fp32 [k]."""
        (k,), d = self.left(shapes)[KEPT], size_of(shapes)
        ends = np.arange(k + 1) * d // k
        lengths = np.diff(ends)
        places = ends[:-1] + (random.random(k) * lengths).astype(np.int64)
        return torch.from_numpy(places), torch.from_numpy(lengths.astype(np.float32))
