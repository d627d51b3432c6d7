"""FoolsGold: silos that always push the same way count for one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedlm.algorithms import pairwise
from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.pairwise import Matrix, Vector, cosines
from fedlm.algorithms.robust import Robust, tell
from fedlm.algorithms.spaces import Factors, Products
from fedlm.messages import Tensors

HISTORY = "history/"
"""Prefix of the sum of a silo's updates in the server's state, one vector by the silo's name."""


class FoolsGold(Robust):
    """theta <- theta + eta (1/n) sum_i a_i u_i, with a_i in [0, 1] the smaller the more alike a silo's history H_i, the
    sum of its updates, is to another's (Fung et al., RAID 2020, algorithm 1):

        s_ij = cos(H_i, H_j), v_i = max_j s_ij; s_ij <- s_ij v_i / v_j where v_j > v_i ('pardoning')
        a_i = 1 - max_j s_ij, over the largest of them; a_i <- kappa (ln(a_i / (1 - a_i)) + 0.5), cut to [0, 1]

    kappa is the recipe's `confidence`. The paper sums gradients; here their mean is taken. Its cosines may be weighted
    by which features matter for a class, which a language model has no counterpart of: all values count alike.

    Against many silos of one hand, however many they are. One bad silo alone is not stopped, nor how far it goes;
    honest silos of like text look like one hand, and then count for little. Histories are the server's state: as many
    values as an update for every silo that ever answered, in memory and in every checkpoint.
    """

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        assert isinstance(space, Factors), "the recipe refuses products"
        names, histories = [kept.place.silo for kept in gathered.kept], dict(state)
        for i, name in enumerate(names):
            history = histories.get(HISTORY + name)
            history = torch.zeros(space.size) if history is None else history.clone()
            for start, end in space.spans(1):
                history[start:end] += gathered.block(start, end, [i])[0]
            histories[HISTORY + name] = history

        def block(start: int, end: int) -> Tensor:
            return torch.stack([histories[HISTORY + name][start:end] for name in names])

        g = pairwise.gram((block(*span) for span in space.spans()), len(names))
        c = credibility(g, self.spec.confidence) / len(names)
        tell(gathered, c)
        return space.moved(c), histories


def credibility(g: Matrix, kappa: float) -> Vector:
    """a [n] from the inner products of the histories; all 0 where all are the same."""
    s = cosines(g)
    np.fill_diagonal(s, 0.0)
    v = s.max(axis=1)
    more = v[None] > v[:, None]  # where this holds v_j > v_i >= 0
    s = np.where(more, s * np.divide(v[:, None], v[None], out=np.ones_like(s), where=more), s)
    a: Vector = np.clip(1.0 - s.max(axis=1), 0.0, 1.0)
    if a.max() == 0:
        return a
    a = a / a.max()
    with np.errstate(divide="ignore"):  # 0 and 1 become -inf and inf, which are cut
        found: Vector = np.clip(kappa * (np.log(a) - np.log1p(-a) + 0.5), 0.0, 1.0)
    return found
