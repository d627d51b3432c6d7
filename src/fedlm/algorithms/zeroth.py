"""What the zeroth-order methods share in the silo: `fedlm.training.zeroth` with a round's session."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedlm.algorithms.base import LocalRule, Place, Session
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec
from fedlm.training.loop import TrainResult, Window
from fedlm.training.zeroth import Direction, Stride, train_zeroth

EPS = {"float32": 1e-3, "bfloat16": 1e-2}
"""Defaults of `zo_eps` by the base's dtype. On SmolLM2-135M with LoRA, projected gradients in bf16 are off by 1.2 times
their size at 1e-3 and by 0.14 times at 1e-2; in fp32 the two differ by 0.02."""


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
            eps=self.spec.zo_eps or EPS[session.recipe.model.dtype],
            direction=direction,
            stride=stride,
            objective=session.objective(),
            observe=session.observe,
            silo=self.place.silo,
            should_stop=session.should_stop,
        )
