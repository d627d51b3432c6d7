"""FLAME: the largest group of silos that go the same way, cut to the median length, and noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.algorithms.base import Accumulator, Place
from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.norm_bound import shrinking
from fedlm.algorithms.pairwise import Matrix, cosines
from fedlm.algorithms.robust import Robust, tell
from fedlm.algorithms.spaces import Factors, Products
from fedlm.errors import MissingExtra
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator

NOISE = 0.1
"""Without a lambda in the recipe: the norm of the noise on all values together, as a share of S."""


class FLAME(Robust):
    """HDBSCAN on cosine distances admits one cluster of more than half of the silos; their updates are cut to the
    median S of all norms and averaged; every value gets noise N(0, (lambda S)^2)
    (after Nguyen et al., USENIX Security 2022, algorithm 1).

    n >= 2f + 1. Of d values the noise together is lambda sqrt(d) S, which `noise_norm` in rounds.jsonl says as a
    multiple of S. lambda is the recipe's `noise`. Without it, lambda is 0.1 / sqrt(d), so that the noise is a tenth of
    S whatever the size: the paper's 0.001 is for a value, and so makes 1.5 S on LoRA of rank 8 on SmolLM2-135M (d = 2.4
    million), more than the whole step, which is at most S. This is no differential privacy: S is read from the updates
    themselves.

    It is FLAME in three parts, not in all of its words: cosines are of updates, where the paper has those of models;
    the cluster is scikit-learn's; what the paper says of computing under encryption is left out. The cluster is what is
    left when the silos at the rim are taken away one after the other while more than half remain: honest silos at the
    rim are not admitted, and where the last that remain part into no majority, all of these are.
    """

    def asked(self, accumulator: Accumulator, silos: Sequence[str], place: Place) -> None:
        require_clustering()
        super().asked(accumulator, silos, place)

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        g = space.gram()
        admitted, norms = majority(1.0 - cosines(g)), np.sqrt(np.maximum(g.diagonal(), 0.0))
        gathered.figures["chosen"] = [gathered.kept[int(i)].place.silo for i in np.flatnonzero(admitted)]
        c = admitted / admitted.sum() * shrinking(norms, None)
        tell(gathered, c)
        if isinstance(space, Products):
            return space.moved(c), state  # the recipe has no noise there
        root = math.sqrt(space.size)
        rate = NOISE / root if self.spec.noise is None else self.spec.noise
        place, sigma = gathered.kept[0].place, rate * float(np.median(norms))
        gathered.figures["noise_norm"] = rate * root
        stepped = space.moved(c)
        for name in space.layout if sigma > 0 else ():
            draw = torch_generator(place.seed, "flame", name, place.round)
            stepped[name] = stepped[name] + sigma * torch.randn(stepped[name].shape, generator=draw)
        return stepped, state


def require_clustering() -> None:
    """Raise MissingExtra where scikit-learn is not installed."""
    try:
        import sklearn.cluster  # noqa: F401
    except ImportError:
        raise MissingExtra("the algorithm flame", "selection") from None


def majority(distances: Matrix) -> NDArray[np.bool_]:
    """Who is in the one cluster of more than half of all [n]. Two are always together."""
    n = len(distances)
    if n < 3:
        return np.ones(n, dtype=np.bool_)
    require_clustering()
    from sklearn.cluster import HDBSCAN

    # scikit-learn counts a point among its own neighbours, so that 2 are the paper's 1.
    cluster = HDBSCAN(
        min_cluster_size=n // 2 + 1, min_samples=2, metric="precomputed", allow_single_cluster=True, copy=True
    )
    found: NDArray[np.bool_] = cluster.fit_predict(np.maximum(distances, 0.0)) >= 0
    return found
