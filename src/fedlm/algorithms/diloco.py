"""DiLoCo: long local training, and Nesterov momentum at the server."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors

MOMENTUM = "v/"
"""Prefix of the outer momentum's names, at the server and where a silo keeps one of its own."""


class DiLoCo(FedAvg):
    """H inner steps of AdamW in every silo, then one outer step of SGD with Nesterov momentum (Douillard et al., 2023).

        Delta = sum_i p_i (theta - theta_i);  v <- beta v + Delta;  theta <- theta - eta (Delta + beta v)

    H is `training.steps`, eta the recipe's `server_lr` (0.7 by default), beta its `server_momentum` (0.9); the outer
    step is that of torch.optim.SGD(nesterov=True) on Delta, where the momentum begins at 0. The paper's p_i are equal
    for shards of one size; the recipe's `weights` decide here. Its silos keep their inner AdamW between rounds:
    `training.keep_optimizer`. Outer momentum is fp32; what no silo trained stays, and so does its momentum.
    """

    default_server_lr = 0.7

    def init_state(self, parameters: Tensors) -> Tensors:
        return {MOMENTUM + name: torch.zeros_like(theta, dtype=torch.float32) for name, theta in parameters.items()}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped = dict(parameters)
        for name, u in accumulator.mean():
            v = state[MOMENTUM + name]
            stepped[name] = nesterov(parameters[name], u, v, self.server_lr, self.spec.server_momentum)
        return stepped, state


def nesterov(theta: torch.Tensor, u: torch.Tensor, v: torch.Tensor, eta: float, beta: float) -> torch.Tensor:
    """theta after an outer step along u = -Delta: v <- beta v + u in place, then theta + eta (u + beta v)."""
    v.mul_(beta).add_(u)
    return torch.add(theta, torch.add(u, v, alpha=beta), alpha=eta)
