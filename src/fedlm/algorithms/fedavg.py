"""FedAvg: the weighted mean of what the silos learnt."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, Algorithm, Step
from fedlm.messages import Tensors


class FedAvg(Algorithm):
    """theta <- theta + eta * sum_i p_i u_i, with p_i = n_i / sum of n (McMahan et al., AISTATS 2017; see `weight_of`).

    With eta = 1 (the default) this is the weighted mean of the silos' models.
    """

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        moved = {name: torch.add(parameters[name], u, alpha=self.server_lr) for name, u in accumulator.mean()}
        return parameters | moved, state  # what no silo trained stays
