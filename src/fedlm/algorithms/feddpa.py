"""FedDPA: a global and a personal LoRA adapter that act together."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors

LOCAL = "local/"
"""Prefix of the personal adapter's names in the silo's state."""


class FedDPA(FedAvg):
    """A silo works with W + a s B_l A_l + (1 - a) s B_g A_g: its own adapter and the federation's
    (Yang et al., NeurIPS 2024; the variant FedDPA-T, which learns both in every round).

    First the personal adapter (l) is trained with the received global one (g) acting beside it, frozen; then the global
    adapter is trained by itself, as in FedAvg, and sent. A silo's first personal adapter has the A that it receives and
    B = 0. Silos are measured with both; the adapter that a run leaves is the global one.

    a is the recipe's `local_weight`. The paper then weighs the two anew for every text that is read, by how much it
    resembles the silo's own rows; that is not done here, a stays fixed. B_l is kept times a, which is the same model;
    B_l learns 1 / a times faster than in the paper with AdamW, which scales its steps by itself, and 1 / a^2 with SGD.

    The frozen adapter acts as a delta (`fedlm.models.deltas`). A round takes twice as long as FedAvg's.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Dual(received, silo_state, place, self.both(received, silo_state, place))

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return self.both(received, silo_state, place) if silo_state else received

    def both(self, theta: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        """The silo's adapter, and the global one as a delta."""
        factor = (1 - self.spec.local_weight) * self.adapter.scale(place.rank)
        values: Tensors = {}
        for name, value in theta.items():
            is_b = ".lora_B." in name
            values[name] = silo_state.get(LOCAL + name, torch.zeros_like(value) if is_b else value)
            piece = name.replace(".lora_", ".delta_").replace(".weight", ".global")
            values[piece] = value * factor if is_b else value
        return values


class Dual(LocalRule):
    """FedDPA in the silo: its own adapter's round, then the global one's. Its state is its own adapter."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, both: Tensors) -> None:
        super().__init__(received, silo_state, place)
        self.both = both

    def run(self, session: Session) -> Outcome:
        _, own = session.train(LocalRule(self.both, {}, self.place), purpose="personal")
        result, trained = session.train(self)
        update, _ = self.finish(trained)
        return Outcome(result, update, {LOCAL + name: value for name, value in own.items()})
