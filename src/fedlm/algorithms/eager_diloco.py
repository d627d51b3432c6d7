"""Eager DiLoCo: a silo does not wait for the others' pseudo-gradients, it takes theirs of the round before."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.diloco import MOMENTUM, DiLoCo, nesterov
from fedlm.errors import TrainingError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec

LATE, LAST = "late/", "last/"
"""Prefixes of names: the mean update of the round before; in a silo, its own of that round."""


class EagerDiLoCo(DiLoCo):
    """DiLoCo with outer steps that overlap the next inner steps entirely (Kale et al., 2025).

    With Delta_m the pseudo-gradient of silo m and Delta the mean of all M, each silo takes after its H inner steps of
    round t an outer step (that of `diloco`, with a momentum of its own) along

        1/M Delta_m(t) + (Delta(t-1) - 1/M Delta_m(t-1))

    its own fresh pseudo-gradient in place of the one it gave a round ago. Delta(t-1) had the whole round to arrive, so
    nobody waits. Before round 0 every Delta is 0. One silo alone is `diloco`.

    Silos' models differ. The global model, which is measured and exported, is their mean: the outer step is linear, so
    the coordinator follows it along 1/M Delta(t) + (1 - 1/M) Delta(t-1) without seeing them. What travels down is
    Delta(t-1), and the model in round 0 alone; so every silo must take part in every round. The paper also does this
    per fragment of Streaming DiLoCo, which is not here. Rounds wait for the silos' updates: this is what eager silos
    compute, not how much time they save.
    """

    def init_state(self, parameters: Tensors) -> Tensors:
        late = {LATE + name: torch.zeros_like(theta, dtype=torch.float32) for name, theta in parameters.items()}
        return super().init_state(parameters) | late

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        return parameters if round_ == 0 else {name: t for name, t in state.items() if name.startswith(LATE)}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Eager(received, silo_state, place, self.spec, self.server_lr)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped, following, share = dict(parameters), dict(state), 1.0 / accumulator.count
        for name, u in accumulator.mean():
            eager = torch.add(u * share, state[LATE + name], alpha=1.0 - share)
            v = state[MOMENTUM + name]
            stepped[name] = nesterov(parameters[name], eager, v, self.server_lr, self.spec.server_momentum)
            following[LATE + name] = u
        return stepped, following


class Eager(LocalRule):
    """The silo's side. Its state is its own model, under the parameters' names, its outer momentum and its last update.

    Args:
        eta: of the outer step.

    Raises:
        TrainingError: this silo was not there from round 0 on, so it has no model to go on from.
    """

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec, eta: float) -> None:
        super().__init__(received, silo_state, place)
        if not silo_state and place.round:
            raise TrainingError(
                f"this silo has no model of its own in round {place.round}: with 'eager-diloco' it is sent in round 0",
                where=place.silo,
                fix="start a new run with this silo",
            )
        self.spec, self.eta = spec, eta

    def start(self) -> Tensors:
        if not self.silo_state:
            return self.received
        return {name: t for name, t in self.silo_state.items() if not name.startswith((MOMENTUM, LAST))}

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, _ = super().finish(trained)
        start, state, share = self.start(), dict[str, torch.Tensor](), 1.0 / self.place.silos
        for name, u in update.items():
            eager = u * share
            if self.silo_state:
                others = torch.add(self.received[LATE + name], self.silo_state[LAST + name], alpha=-share)
                eager = eager + others
            v = self.silo_state.get(MOMENTUM + name, torch.zeros_like(u)).clone()
            state[name] = nesterov(start[name], eager, v, self.eta, self.spec.server_momentum)
            state[MOMENTUM + name], state[LAST + name] = v, u
        return update, state
