"""Krum: of all updates the one whose neighbours are nearest."""

from __future__ import annotations

import numpy as np

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.pairwise import Matrix, Vector, squared_distances
from fedlm.algorithms.robust import Combining
from fedlm.algorithms.spaces import Factors, Products


class Krum(Combining):
    """theta <- theta + eta u_k with k = argmin_i sum over the n - f - 2 updates nearest to u_i of |u_i - u_j|^2
    (Blanchard et al., NeurIPS 2017, section 4); needs n >= 2f + 3. Of equal scores the silo that is first by name.

    One silo's update is all that a round learns from: where silos differ, the others' text is lost. In thousands of
    dimensions honest updates lie far apart, and a bad silo that stays within that distance can be the one chosen
    (Baruch et al., NeurIPS 2019).
    """

    def coefficients(self, space: Factors | Products, gathered: Gathered) -> Vector:
        c = np.zeros(len(gathered.kept))
        c[int(np.argmin(scores(squared_distances(space.gram()), self.spec.byzantine)))] = 1.0
        return c


def scores(squares: Matrix, f: int) -> Vector:
    """For each vector the sum of its n - f - 2 smallest squared distances [n, n] to the others; one of them at least.

    >>> scores(np.array([[0.0, 1, 9], [1, 0, 4], [9, 4, 0]]), 0).tolist()
    [1.0, 1.0, 4.0]
    """
    n = len(squares)
    others = np.sort(squares + np.diag(np.full(n, np.inf)), axis=1)
    found: Vector = others[:, : max(1, n - f - 2)].sum(axis=1)
    return found
