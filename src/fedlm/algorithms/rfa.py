"""RFA: the geometric median of the updates."""

from __future__ import annotations

import numpy as np

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.pairwise import Anchored, Matrix, Vector, squared_distances
from fedlm.algorithms.robust import Combining
from fedlm.algorithms.spaces import Factors, Products
from fedlm.errors import RunError

ITERATIONS = 10_000
"""Steps after which the median is as near as it gets; each is one product of a matrix [n, n] and a vector."""

SETTLED = 1e-13
"""The steps end when the sum of distances falls by less than this share of it."""


class RFA(Combining):
    """v = argmin sum_i p_i |v - u_i|, by the smoothed Weiszfeld algorithm (Pillutla et al., IEEE TSP 2022,
    algorithm 2):

        v <- sum_i b_i u_i / sum_i b_i   with   b_i = p_i / max(nu, |v - u_i|)

    p_i are the recipe's weights; silos that together weigh less than half can move v only so far. n >= 2f + 1, and no f
    silos of a round may weigh half of it.

    The paper takes a few steps from the mean, since each asks the silos once more. Here every v is a combination of the
    updates whose distances follow from their inner products, so the steps go on until nothing changes, and they begin
    in the middle of the half of the silos that lies nearest together: from the mean, a value of 10^30 is still 10^28
    after a few steps.
    """

    def require(self, gathered: Gathered) -> None:
        super().require(gathered)
        weights = sorted((kept.weight for kept in gathered.kept), reverse=True)
        if self.spec.byzantine and 2 * sum(weights[: self.spec.byzantine]) >= sum(weights):
            raise RunError(
                f"the {self.spec.byzantine} heaviest silos weigh half of the round or more, and 'rfa' withstands only "
                "less than half",
                fix="take `weights: equal` in a new run",
            )

    def coefficients(self, space: Factors | Products, gathered: Gathered) -> Vector:
        p = np.array([kept.weight for kept in gathered.kept])
        return weiszfeld(space.gram(), p / p.sum(), self.spec.smoothing)


def weiszfeld(g: Matrix, p: Vector, nu: float) -> Vector:
    """Coefficients c, which sum to 1, of the geometric median of vectors with inner products g and weights p."""
    apart = np.sqrt(squared_distances(g))
    middle = int(np.argmin(apart @ p))
    vectors = Anchored(g, middle)
    near = np.argsort(apart[middle], kind="stable")
    half = near[: int(np.searchsorted(np.cumsum(p[near]), 0.5)) + 1]
    c = np.zeros(len(p))
    c[half] = p[half] / p[half].sum()
    before = np.inf
    for _ in range(ITERATIONS):
        distances = vectors.distances(c)
        total = float(p @ distances)
        if before - total <= SETTLED * total:
            break
        before = total
        b = p / np.maximum(nu, distances)
        c = b / b.sum()
    return c
