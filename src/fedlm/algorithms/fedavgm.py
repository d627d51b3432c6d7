"""FedAvgM: momentum at the server."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors


class FedAvgM(FedAvg):
    """v <- beta v + mean(u_i); theta <- theta + eta v (Hsu et al., 2019).

    This is SGD with momentum on the pseudo-gradient -mean(u_i); beta is the recipe's `server_momentum`.
    """

    def init_state(self, parameters: Tensors) -> Tensors:
        return {f"v/{name}": torch.zeros_like(theta, dtype=torch.float32) for name, theta in parameters.items()}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped = dict(parameters)  # what no silo trained stays
        for name, u in accumulator.mean():
            v = state[f"v/{name}"].mul_(self.spec.server_momentum).add_(u)
            stepped[name] = torch.add(parameters[name], v, alpha=self.server_lr)
        return stepped, state
