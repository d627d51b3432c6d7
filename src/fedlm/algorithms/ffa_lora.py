"""FFA-LoRA: A stays where it was drawn, B is averaged."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedlm.algorithms.base import Place
from fedlm.algorithms.fedit import FedIT
from fedlm.messages import Tensors


class FFALoRA(FedIT):
    """B = sum p_i B_i with A frozen at its shared first value (Sun et al., ICLR 2024).

    mean(B_i) A = mean(B_i A), so aggregation is exact, and noise on B is not multiplied by noise on A. A never travels,
    since every silo draws the same one from the run's seed.
    """

    def trainable(self, name: str) -> bool:
        return ".lora_B." in name

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        return first()

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        return self.evaluated(parameters, state)

    def evaluated(self, parameters: Tensors, state: Tensors) -> Tensors:
        return {name: value for name, value in parameters.items() if self.trainable(name)}

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        both = super().expected_update(parameters, place)
        return {name: shape for name, shape in both.items() if self.trainable(name)}
