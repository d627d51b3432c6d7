"""FedNova: silos that take more local steps do not count for more."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.batches import steps_per_round
from fedlm.training.schedule import learning_rate

TAU = "tau"
"""The name under which |a_i|_1 travels, a tensor of one value."""


class FedNova(FedAvg):
    """theta <- theta + eta tau_eff sum_i p_i d_i with d_i = u_i / |a_i|_1 and tau_eff = sum_i p_i |a_i|_1
    (Wang et al., NeurIPS 2020).

    a_i are the weights that a silo's local gradients have in its update, in units of the learning rate: one for each
    step of plain SGD, so |a_i|_1 is then the number of steps. FedAvg gives silo i the weight p_i |a_i|_1 and so
    minimises another objective than the recipe's where silos differ in steps: those that are cut off by their time
    count for less. With equal steps it is FedAvg.

    |a_i|_1 is exact for SGD, with its momentum and the schedule of the rate. AdamW's step hardly depends on the size of
    the gradient, and counts as one step of its rate. Clipping, weight decay and moments kept from earlier rounds are
    left out of it.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Normalised(received, silo_state, place)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return super().expected_update(parameters, place) | {TAU: torch.Size([1])}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped, mean = dict(parameters), dict(accumulator.mean())
        tau = float(mean.pop(TAU))
        for name, d in mean.items():
            stepped[name] = torch.add(parameters[name], d, alpha=self.server_lr * tau)
        return stepped, state


class Normalised(LocalRule):
    """FedNova in the silo."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place) -> None:
        super().__init__(received, silo_state, place)
        self.tau = 0.0
        """|a_i|_1; of plain SGD at a constant rate until the round's end says better."""

    def correct(self, parameters: dict[str, Parameter]) -> None:
        self.tau += 1

    def run(self, session: Session) -> Outcome:
        result, trained = session.train(self)
        spec = session.recipe.training
        taken = [step for step in range(result.steps) if step not in result.skipped]
        self.tau = gradient_weight(spec, self.place, steps_per_round(spec, len(session.tokens)), taken)
        return Outcome(result, *self.finish(trained))

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, state = super().finish(trained)
        if self.tau > 0:  # a single step at the beginning of a warm-up has the rate 0
            update = {name: u / self.tau for name, u in update.items()}
        return update | {TAU: torch.tensor([self.tau])}, state


def gradient_weight(spec: TrainingSpec, place: Place, planned: int, taken: Iterable[int]) -> float:
    """|a|_1 of those of a round's `planned` steps that were taken: with the rates r_k lr and momentum rho, the gradient
    of step j has the weight sum_{k >= j} r_k rho^(k - j).

    >>> gradient_weight(TrainingSpec(steps=4, optimizer="sgd", momentum=0.5, schedule="constant"), Place(), 4, range(2))
    2.5
    """
    rho = spec.momentum if spec.optimizer == "sgd" else 0.0
    total = applied = 0.0
    for k in taken:
        applied = 1.0 + rho * applied  # what step k takes of all gradients so far
        total += applied * learning_rate(spec, (place.round * planned + k) / (place.rounds * planned)) / spec.lr
    return total
