"""FeedSign: full weights tuned by votes of one bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.zeroth import ZerothOrder
from fedlm.messages import Tensors
from fedlm.models.directions import SCALARS, direction
from fedlm.recipe.schema import AlgorithmSpec
from fedlm.training.batches import steps_per_round

VOTES, STEPS = "feedsign.votes", "feedsign.steps"
"""One bit per step (1: the loss rises along z), packed into uint8, high bits first; how many steps: int64 [1]."""


class FeedSign(Algorithm):
    """Every silo sends the sign of its projected gradient, the majority's sign f is everybody's step: w <- w - eta f z
    (Cai et al., 2025). The direction z of a step is shared; eta is `server_lr`, the same for all steps.

    In the paper every step is a round of its own, which here is `training.steps: 1`. With more, a round votes on that
    many directions at the same global model, each with its own batch, and takes all the steps at its end. A tie counts
    as a rise: z is as likely as -z. Every silo has one vote, whatever it holds.

    The global model is the list of all votes so far, one bit each; silos rebuild the weights from the base.
    """

    default_server_lr = 1e-4
    update_dtypes = (torch.uint8,)

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        return {VOTES: torch.zeros(0, dtype=torch.uint8), STEPS: torch.zeros(1, dtype=torch.int64)}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Voter(received, silo_state, place, self.spec, self.server_lr)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return described(received, self.server_lr)

    def exported(self, parameters: Tensors, state: Tensors) -> Tensors:
        return described(parameters, self.server_lr)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {VOTES: torch.Size([-(-place.steps // 8)])}

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        signs = _signs(update[VOTES], place.steps)
        tally = accumulator.total.setdefault(VOTES, torch.zeros(0))
        if len(tally) < len(signs):  # silos that stopped early have not voted on the last directions
            tally = accumulator.total[VOTES] = torch.cat([tally, torch.zeros(len(signs) - len(tally))])
        tally[: len(signs)] += signs
        accumulator.weight += weight
        accumulator.count += 1

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        signs = torch.cat([_signs(parameters[VOTES], int(parameters[STEPS])), accumulator.total[VOTES]])
        return {VOTES: _packed(signs >= 0), STEPS: torch.tensor([len(signs)])}, state


class Voter(ZerothOrder):
    """FeedSign in the silo."""

    def __init__(
        self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec, server_lr: float
    ) -> None:
        super().__init__(received, silo_state, place, spec)
        self.server_lr = server_lr

    def start(self) -> Tensors:
        return described(self.received, self.server_lr)

    def run(self, session: Session) -> Outcome:
        before = int(self.received[STEPS])
        rises = torch.zeros(steps_per_round(session.recipe.training, len(session.tokens)), dtype=torch.bool)

        def stride(step: int, slope: float, rate: float) -> float:  # noqa: ARG001
            rises[step] = slope >= 0
            return 0.0

        weights = session.put(self.start())
        result = self.go(session, weights, lambda step: direction(self.place.seed, before + step), stride)
        return Outcome(result, {VOTES: _packed(rises[: result.steps])}, {})


def described(votes: Tensors, server_lr: float) -> Tensors:
    """The votes so far as scalars a_t = eta f_t."""
    return {SCALARS: _signs(votes[VOTES], int(votes[STEPS])) * server_lr}


def _packed(rises: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(rises.numpy()))


def _signs(votes: Tensor, steps: int) -> Tensor:
    """+1 or -1 of each step, fp32."""
    return torch.from_numpy(np.unpackbits(votes.numpy(), count=steps)).to(torch.float32) * 2 - 1
