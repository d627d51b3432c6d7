"""FLTrust: silos count for as much as they agree with one that is trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlm.algorithms.base import Accumulator, Place
from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.pairwise import Vector
from fedlm.algorithms.robust import Combining
from fedlm.algorithms.spaces import Factors, Products
from fedlm.errors import RunError


class FLTrust(Combining):
    """theta <- theta + eta sum_i t_i (|u_0| / |u_i|) u_i / sum_i t_i with t_i = max(0, cos(u_i, u_0))
    (Cao et al., NDSS 2021, algorithm 2).

    u_0 is made on root data whose cleanness is certain. The paper's server trains on them; this coordinator never sees
    text and has no model to train, so a silo that it trusts plays that part: the recipe's `root`, which holds the root
    data and trains as all others do. u_0 itself is no part of the mean.

    Any number of other silos may be bad. Where the trusted one is bad, or its text leads elsewhere than the others',
    nothing holds. If no silo agrees with it at all, the model stays for a round.
    """

    def asked(self, accumulator: Accumulator, silos: Sequence[str], place: Place) -> None:
        super().asked(accumulator, silos, place)
        if self.spec.root not in silos:
            raise RunError(
                f"the trusted silo '{self.spec.root}' is not among those asked",
                where="federation.algorithm.root",
                fix=f"name one of {', '.join(list(silos)[:5])}",
            )
        if len(silos) < 2:
            raise RunError("beside the trusted silo there is no other", where="federation.algorithm.root")

    def coefficients(self, space: Factors | Products, gathered: Gathered) -> Vector:
        names = [kept.place.silo for kept in gathered.kept]
        if self.spec.root not in names:
            raise RunError(
                f"the trusted silo '{self.spec.root}' has no update in this round, so none can be judged",
                fix="mend it and continue with --resume",
            )
        root = names.index(self.spec.root)
        return trusted(space.inner(root), np.sqrt(space.squares()), root)


def trusted(inner: Vector, norms: Vector, root: int) -> Vector:
    """Coefficients [n] from the inner products with the root's update and all norms; the root's own is 0."""
    scale = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    trust = np.maximum(inner * scale * scale[root], 0.0)
    trust[root] = 0.0
    total = float(trust.sum())
    return trust / total * norms[root] * scale if total > 0 else np.zeros_like(norms)
