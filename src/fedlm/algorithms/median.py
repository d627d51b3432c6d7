"""Median: of every value the middle one of the silos'."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.robust import Robust
from fedlm.algorithms.spaces import Factors, Products
from fedlm.messages import Tensors


class Median(Robust):
    """theta <- theta + eta med{u_i}, coordinate by coordinate (Yin et al., ICML 2018, definition 1); n >= 2f + 1.

    Of an even number of values the mean of the two in the middle. Every coordinate lies between two honest silos'
    values as long as most are honest; which silos these are differs from one coordinate to the next, so the result may
    be no model that any silo would have trained.
    """

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        return space.moved_by(median), state


def median(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of each row."""
    x.sort(axis=1)
    n = x.shape[1]
    found: NDArray[np.float32] = (x[:, (n - 1) // 2] + x[:, n // 2]) / np.float32(2)
    return found
