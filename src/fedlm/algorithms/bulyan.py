"""Bulyan: Krum chooses who counts, then of every value those nearest the median are averaged."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.krum import scores
from fedlm.algorithms.pairwise import Matrix, squared_distances
from fedlm.algorithms.robust import Robust
from fedlm.algorithms.spaces import Factors, Products
from fedlm.messages import Tensors


class Bulyan(Robust):
    """Krum, again and again among those not yet chosen, chooses theta = n - 2f updates; then each coordinate is the
    mean of the beta = theta - 2f values nearest to the theta values' median (El Mhamdi et al., ICML 2018, section 4);
    needs n >= 4f + 3.

    Against a bad silo that hides a large change of one coordinate in a small distance, which Krum does not see. With
    `robust_on: product` silos are chosen by their products, and the coordinates are those of the products.
    """

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        f = self.spec.byzantine
        chosen = selection(squared_distances(space.gram()), f)
        gathered.figures["chosen"] = [gathered.kept[i].place.silo for i in chosen]
        return space.moved_by(lambda x: middle_mean(x, len(chosen) - 2 * f), chosen), state


def selection(squares: Matrix, f: int) -> list[int]:
    """The n - 2f vectors that Krum chooses one after the other, in ascending order."""
    left = list(range(len(squares)))
    chosen: list[int] = []
    while len(chosen) < len(squares) - 2 * f:
        among = squares[np.ix_(left, left)]
        chosen.append(left.pop(int(np.argmin(scores(among, f))) if len(left) > 1 else 0))
    return sorted(chosen)


def middle_mean(x: NDArray[np.float32], beta: int) -> NDArray[np.float32]:
    """Of each row the mean of the beta values nearest to its median; of those equally near the lower ones.

    In sorted order they lie side by side: the window whose farther end is nearest to the median.
    """
    x.sort(axis=1)
    n = x.shape[1]
    middle = (x[:, (n - 1) // 2] + x[:, n // 2]) / np.float32(2)
    starts = n - beta + 1
    reach = np.maximum(middle[:, None] - x[:, :starts], x[:, beta - 1 :] - middle[:, None])
    first = reach.argmin(axis=1)
    nearest = np.take_along_axis(x, first[:, None] + np.arange(beta)[None], axis=1)
    found: NDArray[np.float32] = nearest.mean(axis=1, dtype=np.float64).astype(np.float32)
    return found
