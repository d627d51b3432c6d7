"""RoLoRA: one round trains and averages B, the next A."""

from __future__ import annotations

from typing import Literal

import torch

from fedlm.algorithms.base import LocalRule, Place
from fedlm.algorithms.fedit import FedIT
from fedlm.messages import Tensors

Factor = Literal["A", "B"]


class RoLoRA(FedIT):
    """B <- sum p_i B_i at fixed A, then A <- sum p_i A_i at fixed B, in turn (Chen et al., NeurIPS 2025).

    All silos share the fixed factor, so every round is exact: mean(B_i) A = mean(B_i A). Both factors are learnt, and
    only the trained one goes up. Round 0 trains B: at B = 0 the gradient of A is 0.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return OneFactor(received, silo_state, place, turn(place.round))

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        both = super().expected_update(parameters, place)
        return {name: shape for name, shape in both.items() if f".lora_{turn(place.round)}." in name}


def turn(round_: int) -> Factor:
    """The factor that a round trains."""
    return "A" if round_ % 2 else "B"


class OneFactor(LocalRule):
    """Local training of one factor, which alone makes the update."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, factor: Factor) -> None:
        super().__init__(received, silo_state, place)
        self.factor = factor

    def trains(self, name: str) -> bool:
        return f".lora_{self.factor}." in name
