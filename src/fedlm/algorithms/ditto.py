"""Ditto: beside the global model, every silo trains one of its own that is drawn to it."""

from __future__ import annotations

from fedlm.algorithms.base import LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.fedprox import Proximal
from fedlm.messages import Tensors

PERSONAL = "personal/"
"""Prefix of v_i's names in the silo's state."""


class Ditto(FedAvg):
    """theta is FedAvg's; silo i also minimises F_i(v) + lambda/2 |v - theta|^2 (Li et al., ICML 2021, algorithm 1).

        v_i <- v_i - eta (grad F_i(v_i) + lambda (v_i - theta))

    theta is the model that the round began with. lambda (the recipe's `ditto_lambda`) leads from training alone
    (lambda = 0) to the global model (lambda large). v_i begins at the theta that a silo first receives and stays in it:
    silos are measured with v_i, and the adapter that a run leaves is theta.

    v_i is trained for as many steps as theta_i, on other batches: a round takes twice as long. Its pull is added to
    the gradient after clipping.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Twofold(received, silo_state, place, self.spec.ditto_lambda)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return personal(received, silo_state)


class Twofold(LocalRule):
    """Ditto in the silo: the global model's round, then its own model's."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, lambda_: float) -> None:
        super().__init__(received, silo_state, place)
        self.lambda_ = lambda_

    def run(self, session: Session) -> Outcome:
        result, trained = session.train(self)
        own = Drawn(self.received, self.silo_state, self.place, self.lambda_)
        _, v = session.train(own, purpose="personal")
        update, _ = self.finish(trained)
        return Outcome(result, update, {PERSONAL + name: value for name, value in v.items()})


class Drawn(Proximal):
    """Training of v_i: FedProx's spring to theta, from where v_i was."""

    def start(self) -> Tensors:
        return personal(self.received, self.silo_state)


def personal(theta: Tensors, silo_state: Tensors) -> Tensors:
    """v_i; theta where the silo has none yet."""
    return {name: silo_state.get(PERSONAL + name, value) for name, value in theta.items()}
