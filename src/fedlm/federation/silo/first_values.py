"""The first values of an adapter, alike in every process of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import Parameter

from fedlm.messages import Tensors
from fedlm.models.deltas import is_delta


class FirstValues:
    """The adapter's shared first values, drawn when they are first needed."""

    def __init__(self, parameters: Mapping[str, Parameter], seed: int, model: Any) -> None:
        from fedlm.models.soft_prompts import SoftPromptModel, first_values

        self._shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self._seed = seed
        self._drawn: Tensors = first_values(model, seed) if isinstance(model, SoftPromptModel) else {}

    def filled(self, tensors: Tensors, start: Tensors) -> Tensors:
        """These tensors and, under every other name of the adapter, its first value: at the layer's rank.

        Args:
            start: first values that stand in for the drawn ones, cut to a smaller rank where the layer has one; and
                deltas, which are added as they are.
        """
        from fedlm.models.adapters import first_value

        whole = {**tensors, **{name: tensor for name, tensor in start.items() if is_delta(name)}}
        for name, shape in self._shapes.items():
            if name in whole:
                continue
            other = tensors.get(
                name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace("_B.", "_A.")
            )
            if other is not None and other.ndim == 2 and ".lora_" in name:
                rank = other.shape[1] if ".lora_A." in name else other.shape[0]
                shape = torch.Size((rank, shape[1]) if ".lora_A." in name else (shape[0], rank))
            if name in start:
                value = start[name]
                smaller = ".lora_" in name and value.ndim == 2
                whole[name] = value[: shape[0], : shape[1]].contiguous() if smaller else value
                continue
            held = self._drawn.get(name)
            if held is None or held.shape != shape:
                held = self._drawn[name] = first_value(name, shape, self._seed)
            whole[name] = held
        return whole
