"""What the zeroth-order methods share in the silo: `fedlm.training.zeroth` with a round's session."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedlm.algorithms.base import LocalRule, Place, Session
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec
from fedlm.training.loop import TrainResult, Window
from fedlm.training.zeroth import Direction, Stride, train_zeroth


class ZerothOrder(LocalRule):
    """A local round without gradients: subclasses say which directions it goes along, and how far."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec = spec

    def go(self, session: Session, weights: Mapping[str, Tensor], direction: Direction, stride: Stride) -> TrainResult:
        """Step these parameters of the session's model in place."""
        return train_zeroth(
            session.model,
            weights,
            session.tokens,
            session.recipe.training,
            Window(self.place.round, self.place.rounds),
            generator_key=(self.place.seed, self.place.silo),
            eps=self.spec.zo_eps,
            direction=direction,
            stride=stride,
            observe=session.observe,
            silo=self.place.silo,
            should_stop=session.should_stop,
        )
