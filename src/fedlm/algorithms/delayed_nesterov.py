"""Delayed Nesterov: outer momentum for silos that answer when they are ready."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Place, Step
from fedlm.algorithms.diloco import MOMENTUM
from fedlm.algorithms.fedbuff import FedBuff
from fedlm.messages import Tensors

BUFFER = "buffer/"
"""Prefix of the sum of pseudo-gradients since the momentum was last refreshed."""


class DelayedNesterov(FedBuff):
    """A server step for every answer, and a refreshed momentum for every N of them (Liu et al., 2024).

    With g the pseudo-gradient of the answer that has come:

        Delta <- Delta + g
        every N-th answer:  m <- beta m + Delta / N;  theta <- theta - eta ((1 - c N + c) beta m + g / N);  Delta <- 0
        the others:         theta <- theta - eta (c beta m + g / N)

    Momentum that takes in each late g by itself drives theta on in directions of the past; here N of them are averaged
    first. Over N answers theta moves by eta (Delta / N + beta m) where c is 0: as one step of Nesterov's on their mean.
    c spreads the momentum's part over the N steps. N is the recipe's `buffer`, c its `momentum_share`, at most 1 / N;
    beta its `server_momentum`, eta its `server_lr`, 0.7 by default. N = 1 is SGD with Nesterov momentum per answer.

    Staleness enters no weight; answers beyond `max_staleness` do not count. The paper's second part, local steps by a
    silo's speed, is `federation.capacity` here.
    """

    default_server_lr = 0.7

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        accumulator.add(update, weight)

    def init_state(self, parameters: Tensors) -> Tensors:
        return {
            prefix + name: torch.zeros_like(theta, dtype=torch.float32)
            for name, theta in parameters.items()
            for prefix in (MOMENTUM, BUFFER)
        }

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        n, c, beta = self.spec.buffer, self.spec.momentum_share, self.spec.server_momentum
        refreshes = (step.round + 1) % n == 0
        stepped = dict(parameters)
        for name, u in accumulator.mean():  # u = -g
            v, buffer = state[MOMENTUM + name], state[BUFFER + name].add_(u)  # v = -m
            if refreshes:
                v.mul_(beta).add_(buffer, alpha=1.0 / n)
                buffer.zero_()
            share = (1.0 - c * n + c if refreshes else c) * beta
            stepped[name] = torch.add(parameters[name], u / n + share * v, alpha=self.server_lr)
        return stepped, state
