"""Trimmed mean: of every value the mean without the largest and the smallest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.robust import Robust
from fedlm.algorithms.spaces import Factors, Products
from fedlm.messages import Tensors


class TrimmedMean(Robust):
    """theta <- theta + eta mean of the u_i without the f largest and the f smallest, coordinate by coordinate
    (Yin et al., ICML 2018, definition 2); n >= 2f + 1.

    The paper's share beta is f / n. With f = 0 it is the mean, which withstands nobody.
    """

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        return space.moved_by(lambda x: trimmed_mean(x, self.spec.byzantine)), state


def trimmed_mean(x: NDArray[np.float32], f: int) -> NDArray[np.float32]:
    """Of each row, without its f smallest and f largest values; in fp64."""
    x.sort(axis=1)
    found: NDArray[np.float32] = x[:, f : x.shape[1] - f].mean(axis=1, dtype=np.float64).astype(np.float32)
    return found
