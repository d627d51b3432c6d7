"""Centred clipping: updates pull at the last round's mean, none further than a radius."""

from __future__ import annotations

import numpy as np
import torch

from fedlm.algorithms import pairwise
from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.pairwise import Anchored, Matrix, Vector
from fedlm.algorithms.robust import Robust, tell
from fedlm.algorithms.spaces import Factors, Products
from fedlm.messages import Tensors

CENTRE = "centre/"
"""Prefix of the last round's step in the server's state, by parameter."""


class CentredClipping(Robust):
    """v <- v + (1/n) sum_i (u_i - v) min(1, tau / |u_i - v|), from v = the last round's v; theta <- theta + eta v
    (Karimireddy et al., ICML 2021, section 4). v = 0 before the first round. n >= 2f + 1; the paper proves less.

    tau is the recipe's `clip_radius`; without it, the median of the round's distances from the last v, which is no part
    of the paper. `clip_iterations` steps are taken in a round, 1 as in the paper.

    f bad silos move v by at most f tau / n in a step, but to the same side in every round. The paper's silos send a
    running mean of their gradients, which is what its proof against such attacks over time rests on; here they send a
    round's update, the sum of many steps.
    """

    def init_state(self, parameters: Tensors) -> Tensors:
        return {CENTRE + name: torch.zeros_like(theta, dtype=torch.float32) for name, theta in parameters.items()}

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        assert isinstance(space, Factors), "the recipe refuses products"
        centre = torch.cat([state[CENTRE + name].reshape(-1) for name in space.layout])
        n = len(gathered.kept)
        blocks = (torch.cat([gathered.block(start, end), centre[None, start:end]]) for start, end in space.spans(n + 1))
        c = clipped(pairwise.gram(blocks, n + 1), self.spec.clip_radius, self.spec.clip_iterations)
        tell(gathered, c[:n])
        v = space.combined(c[:n]).add_(centre, alpha=float(c[n]))
        kept = {
            CENTRE + name: v[start : start + shape.numel()].view(shape).clone()
            for name, (start, shape) in space.layout.items()
        }
        return space.stepped(v), kept


def clipped(g: Matrix, radius: float | None, iterations: int) -> Vector:
    """Coefficients c [n + 1], which sum to 1, of v after these steps, for n updates and the centre behind them."""
    n = len(g) - 1
    vectors, c = Anchored(g, n), np.zeros(n + 1)
    c[n] = 1.0
    tau = float(np.median(vectors.rho[:n])) if radius is None else radius
    for _ in range(iterations):
        distances = vectors.distances(c)[:n]
        pull = np.divide(tau, distances, out=np.ones(n), where=distances > tau) / n
        c *= 1.0 - pull.sum()
        c[:n] += pull
    return c
