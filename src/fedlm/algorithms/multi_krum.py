"""Multi-Krum: the mean of the updates whose neighbours are nearest."""

from __future__ import annotations

import numpy as np

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.krum import scores
from fedlm.algorithms.pairwise import Vector, squared_distances
from fedlm.algorithms.robust import Combining
from fedlm.algorithms.spaces import Factors, Products
from fedlm.errors import RunError


class MultiKrum(Combining):
    """The mean of the m updates of the lowest Krum scores (Blanchard et al., NeurIPS 2017, section 4.1); n >= 2f + 3.

    m is the recipe's `selected`; by default, and at most, n - f - 2, the number of neighbours that a score counts.
    m = 1 is Krum. Up to f of the m may be bad, each no further from the honest ones than they are from each other.
    """

    def coefficients(self, space: Factors | Products, gathered: Gathered) -> Vector:
        n, f = len(gathered.kept), self.spec.byzantine
        most = n - f - 2
        m = most if self.spec.selected is None else self.spec.selected
        if m > most:
            raise RunError(
                f"of {n} updates with {f} bad ones at most {most} can be averaged, and `selected` is {m}",
                fix="mend the silos and continue with --resume, or take a lower federation.algorithm.selected in a "
                "new run",
            )
        c = np.zeros(n)
        c[np.argsort(scores(squared_distances(space.gram()), f), kind="stable")[:m]] = 1.0 / m
        return c
