"""Task arithmetic: what the silos learnt is added up, not averaged."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors


class TaskArithmetic(FedAvg):
    """theta <- theta + lambda sum_i u_i: the sum of the silos' task vectors (Ilharco et al., ICLR 2023, section 2).

    A one-shot merge: `federation.rounds: 1` with enough local steps; with more rounds the task vectors are each
    round's. lambda is the recipe's `server_lr`, best chosen on validation text; 0.3 (the default) is in the range that
    the paper finds good for adding several tasks. Of LoRA, A and B are added up each for itself.
    """

    default_server_lr = 0.3

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped = dict(parameters)  # what no silo trained stays
        for name, mean in accumulator.mean():
            stepped[name] = torch.add(parameters[name], mean, alpha=self.server_lr * accumulator.counted(name))
        return stepped, state
