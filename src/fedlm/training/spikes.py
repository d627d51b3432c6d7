"""Steps whose loss or gradient leaps are left out.

The rule is that of OLMo 2 (Team OLMo, 2025; its `SkipStepOptimizer`): a step is skipped if its loss or its gradient
norm is more than sigma standard deviations above the mean of the steps before it, over a rolling window. What is
skipped enters the window nevertheless, so that a lasting change of level becomes the new normal.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

WINDOW = 128
"""Steps whose losses and norms are remembered."""

LEAST = WINDOW // 2
"""Before so many have been seen nothing is skipped: a mean of few says little, and a model's first losses fall fast."""


class SpikeGuard:
    """What one silo remembers of its last steps, over all rounds.

    Args:
        sigma: how many standard deviations above the mean are too many.
        state: what `state` gave, or None at the beginning.
    """

    def __init__(self, sigma: float, state: Tensor | None = None) -> None:
        self.sigma = sigma
        self.seen: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        """Loss and gradient norm, before clipping, of each step."""
        if state is not None:
            self.seen.extend((loss, norm) for loss, norm in state.tolist())

    @property
    def state(self) -> Tensor:
        """fp64 [steps, 2] on the CPU."""
        return torch.tensor(list(self.seen), dtype=torch.float64).reshape(-1, 2)

    def leaps(self, loss: float, norm: float) -> bool:
        """Whether this step is a spike; it is remembered in either case."""
        found = False
        if len(self.seen) >= LEAST:
            deviation, mean = torch.std_mean(self.state, dim=0)
            found = bool((torch.tensor([loss, norm]).double() - mean > self.sigma * deviation).any())
        self.seen.append((loss, norm))
        return found
