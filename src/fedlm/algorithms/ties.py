"""TIES: only what is large in an update and agrees in sign with the others' is merged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, Place, Step
from fedlm.messages import Tensors

GAINS, LOSSES, RISING, FALLING = "gains", "losses", "rising", "falling"


class Ties(Algorithm):
    """Trim, elect signs, merge what agrees (Yadav et al., NeurIPS 2023, algorithm 1).

        t_i: of u_i the share `density` of largest magnitude, over all parameters together; 0 elsewhere
        gamma = sign(sum_i t_i)
        theta <- theta + lambda mean{t_i : sign(t_i) = gamma}, parameter by parameter

    A one-shot merge: `federation.rounds: 1`; with more rounds the task vectors are each round's. lambda is the recipe's
    `server_lr`. Silos count equally. Of LoRA, A and B are merged each for itself.

    The sum of the positive and of the negative values and their numbers are all that the rule needs, so updates are
    folded as they come: four copies of an update in memory, however many silos there are.
    """

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        names = sorted(update)
        t = trimmed(torch.cat([update[name].reshape(-1).to(torch.float32) for name in names]), self.spec.density)
        rising, falling = t > 0, t < 0
        accumulator.add(
            {GAINS: t.clamp(min=0), LOSSES: t.clamp(max=0), RISING: rising.float(), FALLING: falling.float()}, weight
        )

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        means = dict(accumulator.mean())
        up = means[GAINS] + means[LOSSES] >= 0
        total, number = torch.where(up, means[GAINS], means[LOSSES]), torch.where(up, means[RISING], means[FALLING])
        merged = torch.where(number > 0, total / number, 0.0)
        names = sorted(parameters)
        parts = torch.split(merged, [parameters[name].numel() for name in names])
        stepped = {
            name: torch.add(parameters[name], part.view_as(parameters[name]), alpha=self.server_lr)
            for name, part in zip(names, parts, strict=True)
        }
        return stepped, state


def trimmed(u: Tensor, density: float) -> Tensor:
    """A vector with only its `density` share of largest magnitudes kept (rounded down, at least one)."""
    kept = u.abs().topk(max(1, int(density * u.numel())), sorted=False).indices
    return torch.zeros_like(u).index_copy_(0, kept, u[kept])
