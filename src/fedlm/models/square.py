"""LoRA-SB's square matrix: the change of a weight is s B R A with fixed B, A and a small trained R.

The layer stays a PEFT LoRA layer whose `lora_B` computes B R, so that everything that reads LoRA layers (fused
kernels, merging, export) goes on working, and what is exported is plain LoRA with the factors B R and A.

Tensors of a layer: `lora_A.weight` [r, d_in], `lora_R.weight` [r, r], `lora_B.weight` [d_out, r].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedlm.messages import Tensors


class Square(nn.Module):
    """Stands for the `lora_B` of a PEFT LoRA layer: h -> B R h, with `weight` = B R [d_out, r]."""

    def __init__(self, b: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = b.in_features, b.out_features
        self.B = b.weight
        self.R = nn.Parameter(torch.zeros(b.in_features, b.in_features, dtype=b.weight.dtype, device=b.weight.device))

    @property
    def weight(self) -> Tensor:
        with torch.autocast(self.R.device.type, enabled=False):  # the product is rounded once, as a plain B is
            return self.B @ self.R

    def forward(self, h: Tensor) -> Tensor:
        return linear(h, self.weight)


def insert_squares(layers: dict[str, Any]) -> None:
    """Put R between B and A of these PEFT LoRA layers."""
    for layer in layers.values():
        for adapter, b in layer.lora_B.items():
            layer.lora_B[adapter] = Square(b)


def folded(tensors: Tensors) -> Tensors:
    """Plain LoRA that acts alike: B R (fp32) in the place of B."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_B.weight"):
            out[name] = tensor.float() @ tensors[name.replace(".lora_B.", ".lora_R.")].float()
        elif not name.endswith(".lora_R.weight"):
            out[name] = tensor
    return out


def unfolded(tensors: Tensors) -> Tensors:
    """The way back from `folded`: R is the identity, B what B R was."""
    squares = {
        name.replace(".lora_B.", ".lora_R."): torch.eye(tensor.shape[1])
        for name, tensor in tensors.items()
        if name.endswith(".lora_B.weight")
    }
    return tensors | squares
