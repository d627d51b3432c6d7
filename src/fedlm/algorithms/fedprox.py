"""FedProx: a spring from every silo's model to the round's global one."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import LocalRule, Place
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors


class FedProx(FedAvg):
    """Each silo minimises F_i(w) + mu/2 |w - theta|^2 (Li et al., MLSys 2020): gradient + mu (w - theta).

    The proximal gradient is added after clipping, which is there for the data's gradient. mu = 0 is FedAvg.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Proximal(received, silo_state, place, self.spec.mu)


class Proximal(LocalRule):
    """FedProx in the silo."""

    after_noise = True

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, mu: float) -> None:
        super().__init__(received, silo_state, place)
        self.mu = mu
        self.theta: Tensors = {}

    @torch.no_grad()
    def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        if not self.theta:  # once to the parameters' device
            self.theta = {name: self.received[name].to(w.device) for name, w in parameters.items()}
        for name, w in parameters.items():
            if w.grad is not None:
                w.grad.add_(w - self.theta[name], alpha=self.mu)
