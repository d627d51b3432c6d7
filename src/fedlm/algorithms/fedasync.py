"""FedAsync: every answer is mixed into the global model as it comes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedlm.algorithms.base import LocalRule, Place
from fedlm.algorithms.fedbuff import FedBuff
from fedlm.algorithms.fedprox import Proximal
from fedlm.messages import Tensors


class FedAsync(FedBuff):
    """theta <- (1 - alpha_t) theta + alpha_t theta_i, with alpha_t = alpha s(tau) (Xie et al., 2019, Algorithm 1).

    theta_i is the silo's whole model, not its change: a late one also pulls theta back towards where it started from.
    The silo minimises F_i(w) + mu/2 |w - theta|^2: the paper's rho is the recipe's `mu`, alpha its `server_lr`.
    """

    default_server_lr = 0.6

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Proximal(received, silo_state, place, self.spec.mu)

    def counted(
        self, update: Mapping[str, Tensor], place: Place, start: Tensors, theta: Tensors
    ) -> Mapping[str, Tensor]:
        """theta_i - theta."""
        if place.staleness == 0:  # start is theta
            return update
        return {name: update[name].float() + (start[name].float() - theta[name].float()) for name in update}
