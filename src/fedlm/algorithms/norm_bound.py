"""Norm bound: no update is longer than a bound."""

from __future__ import annotations

import numpy as np

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.pairwise import Vector
from fedlm.algorithms.robust import Combining
from fedlm.algorithms.spaces import Factors, Products


class NormBound(Combining):
    """theta <- theta + eta sum_i p_i u_i / max(1, |u_i| / M) (Sun et al., 2019, norm thresholding).

    M is the recipe's `norm_bound`. Without it M is the median of the round's norms, which is no part of the paper: it
    follows the rounds, and lies between honest silos' norms as long as most are honest.

    f bad silos of weight p each move the mean by at most f p M, in any direction they like, round after round: this
    limits what a round can lose, and keeps nobody out.
    """

    def coefficients(self, space: Factors | Products, gathered: Gathered) -> Vector:
        p = np.array([kept.weight for kept in gathered.kept])
        c: Vector = p / p.sum() * shrinking(np.sqrt(space.squares()), self.spec.norm_bound)
        return c


def shrinking(norms: Vector, bound: float | None) -> Vector:
    """min(1, M / |u_i|), with the median norm for M where no bound is given."""
    bound = float(np.median(norms)) if bound is None else bound
    found: Vector = np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound)
    return found
