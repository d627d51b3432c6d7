"""Matrices as products of two thin ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlm.guards.base import Guard, Parts, Shapes, parted, size_of
from fedlm.guards.cast import SMALLEST
from fedlm.messages import Tensors

LEFT, RIGHT = "\x1fleft", "\x1fright"


class LowRank(Guard):
    """M ~ Q (Q' M), with Q an orthonormal basis of the range of M M' M G, G standard normal [n, q], for every matrix
    M [m, n] by itself (randomised range finder with one power iteration: Halko, Martinsson and Tropp, 2011; for
    federated updates as in PowerSGD: Vogels et al., NeurIPS 2019, without its warm start, so nothing is kept).

    Q' M is the best that Q allows, so |M - C(M)|^2 = |M|^2 - |Q' M|^2: biased, it wants error feedback. q (m + n)
    numbers are left of m n; where that is no less, or a tensor is no matrix, its numbers are left as they are. The rank
    q counts for LoRA's factors themselves, whose smaller side is LoRA's rank.
    """

    def left(self, shapes: Shapes) -> Shapes:
        found: Shapes = {}
        for name, shape in shapes.items():
            if self._thin(shape):
                m, n = shape
                found |= {name + LEFT: torch.Size((m, self.spec.rank)), name + RIGHT: torch.Size((self.spec.rank, n))}
            else:
                found[name] = shape
        return found

    def parts(self, shapes: Shapes) -> Parts:  # noqa: ARG002
        return {}

    def encode(self, values: Tensor, shapes: Shapes, random: np.random.Generator) -> tuple[Tensor, Tensors]:
        layout = self.left(shapes)
        left = torch.empty(size_of(layout))
        matrices, places = parted(values, shapes), parted(left, layout)
        for shape, names in self._alike(shapes).items():
            m = torch.stack([matrices[name] for name in names])
            exponents = torch.frexp(m.abs().amax((1, 2), keepdim=True)).exponent.clamp(min=SMALLEST)
            m = torch.ldexp(m, -exponents)  # by powers of two, so that M M' M neither overflows nor underflows
            g = torch.from_numpy(random.standard_normal((shape[1], self.spec.rank), dtype=np.float32))
            q = torch.linalg.qr(m @ g).Q
            q = torch.linalg.qr(m @ (m.mT @ q)).Q
            for name, basis, rest in zip(names, q, torch.ldexp(q.mT @ m, exponents), strict=True):
                places[name + LEFT].copy_(basis)
                places[name + RIGHT].copy_(rest)
        for name in shapes:
            if name in places:
                places[name].copy_(matrices[name])
        return left, {}

    def decode(self, left: Tensor, parts: Tensors, shapes: Shapes, random: np.random.Generator) -> Tensor:  # noqa: ARG002
        values = torch.empty(size_of(shapes))
        matrices, places = parted(values, shapes), parted(left, self.left(shapes))
        for names in self._alike(shapes).values():
            products = torch.stack([places[n + LEFT] for n in names]) @ torch.stack([places[n + RIGHT] for n in names])
            for name, product in zip(names, products, strict=True):
                matrices[name].copy_(product)
        for name in shapes:
            if name in places:
                matrices[name].copy_(places[name])
        return values

    def _thin(self, shape: torch.Size) -> bool:
        return len(shape) == 2 and self.spec.rank * sum(shape) < shape.numel()

    def _alike(self, shapes: Shapes) -> dict[torch.Size, list[str]]:
        """Names of the matrices that are made thin, by shape: one call for all of a shape."""
        found: dict[torch.Size, list[str]] = {}
        for name, shape in shapes.items():
            if self._thin(shape):
                found.setdefault(shape, []).append(name)
        return found
