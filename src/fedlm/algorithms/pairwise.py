"""Distances of many long vectors from their inner products: what rules against bad silos compare updates by.

The vectors are read once, for a matrix [n, n] of inner products in fp64; whatever a rule does after that costs nothing.
The accepted values of an update are at most 2^108, so that squares of any number of them stay far inside fp64's range.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def gram(blocks: Iterable[Tensor], n: int) -> Matrix:
    """<u_i, u_j> [n, n] in fp64 of vectors that come in blocks [n, some elements], fp32."""
    total = np.zeros((n, n))
    for block in blocks:
        x = block.numpy().astype(np.float64)
        total += x @ x.T
    return total


def squared_distances(g: Matrix) -> Matrix:
    """|u_i - u_j|^2 from the inner products; never below 0."""
    squares = g.diagonal()
    found: Matrix = np.maximum(squares[:, None] + squares[None] - 2 * g, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def cosines(g: Matrix) -> Matrix:
    """Cosines of the angles between the vectors; 0 where one of them is 0."""
    norms = np.sqrt(np.maximum(g.diagonal(), 0.0))
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    found: Matrix = np.clip(g * scale[:, None] * scale[None], -1.0, 1.0)
    return found


class Anchored:
    """Affine combinations v = sum_j c_j u_j with sum_j c_j = 1, and their distances from every u_i.

    All is measured from one of the vectors, the anchor a: v - a = sum_j (c_j rho_j) e_j with rho_j = |u_j - a| and unit
    vectors e_j. A vector that is 10^30 times as far away as the others enters a rule's result with a coefficient of
    about 10^-30; c_j rho_j is of the size of the others' again, and nothing cancels.
    """

    def __init__(self, g: Matrix, anchor: int) -> None:
        around = g - g[anchor][None] - g[:, anchor][:, None] + g[anchor, anchor]
        self.rho = np.sqrt(np.maximum(around.diagonal(), 0.0))
        self.rho[anchor] = 0.0
        around[anchor] = around[:, anchor] = 0.0
        self.angles = cosines(around)
        np.fill_diagonal(self.angles, np.where(self.rho > 0, 1.0, 0.0))

    def distances(self, c: Vector) -> Vector:
        """|v - u_i| of every vector."""
        a = c * self.rho
        along = self.angles @ a
        found: Vector = np.sqrt(np.maximum(self.rho**2 - 2 * self.rho * along + a @ along, 0.0))
        return found
