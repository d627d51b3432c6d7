"""FedMeZO: FedAvg whose silos train without gradients, in the memory of inference."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.zeroth import ZerothOrder
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator


class FedMeZO(FedAvg):
    """MeZO steps in the silo, the weighted mean of their adapters at the server (Ling et al., KDD 2024).

    A local step is w <- w - eta g z, with g = (L(w + eps z) - L(w - eps z)) / (2 eps) on one batch and z standard
    normal (Malladi et al., NeurIPS 2023, algorithm 1). Directions are keyed by (run's seed, silo, round, step). What
    is exchanged are the adapter's values, or with full weights all of them.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return MeZO(received, silo_state, place, self.spec)


class MeZO(ZerothOrder):
    """FedMeZO in the silo."""

    def run(self, session: Session) -> Outcome:
        start, place = self.start(), self.place
        # In the model's order, over which directions are laid out: what was received comes in any.
        weights = {name: p for name, p in session.put(start).items() if name in start and self.trains(name)}

        def direction(step: int) -> torch.Generator:
            return torch_generator(place.seed, "mezo", place.silo, place.round, step)

        result = self.go(session, weights, direction, lambda step, slope, rate: -rate * slope)  # noqa: ARG005
        trained = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}
        return Outcome(result, {name: value.sub_(start[name]) for name, value in trained.items()}, {})
