"""Model FLOPs of training, and how much of a device's peak they are (MFU).

PaLM (Chowdhery et al., 2022, appendix B) counts, per token, 6 N + 12 L H Q T operations: N parameters, each with a
multiply and an add in the forward pass and twice that in the backward pass, and the products of L layers' attention
with H heads of size Q over a sequence of T tokens. What is computed twice (checkpointing) does not count; the causal
half that attention could leave out does. Two things are as they are here: a lookup is no product, so an input embedding
that is not the output matrix too is left out of N; and frozen weights need no gradient of their own, so they count 4,
not 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlm.training.attention import causal_model

PEAKS: dict[str, float] = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "T4": 65e12,
    "V100": 125e12,
}
"""Dense bf16 (T4 and V100: fp16) operations per second by what a GPU's name contains, from the makers' data sheets; the
first that fits counts. A CPU's peak depends on what it is paired with, so there is none."""


def flops_per_token(model: nn.Module, length: float) -> float:
    """Model FLOPs of training on one token, of the parameters as they require gradients now.

    Args:
        length: tokens of a sequence, as a token sees it on average (see `seen_length`).
    """
    inner = causal_model(model)
    config: Any = inner.config
    embedding, output = inner.get_input_embeddings(), inner.get_output_embeddings()
    lookup = None if output is None or output.weight is embedding.weight else embedding.weight
    count = sum((6 if p.requires_grad else 4) * p.numel() for p in model.parameters() if p is not lookup)
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    return float(count + 12 * config.num_hidden_layers * width * length)


def seen_length(lengths: NDArray[np.int64]) -> float:
    """Mean length of the sequences that tokens are in: sum of squares over sum.

    >>> seen_length(np.array([1, 3]))
    2.5
    """
    return float((lengths.astype(np.float64) ** 2).sum() / max(lengths.sum(), 1))


def peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations per second that the device could do in bf16; None for another dtype, a CPU, or an unknown device."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((found for part, found in PEAKS.items() if part in name), None)


def rates(model: nn.Module, lengths: NDArray[np.int64], tokens_per_second: float, devices: int = 1) -> dict[str, float]:
    """`flops_per_second` of a training, and `mfu` where the peak of its devices is known.

    Args:
        lengths: of the silo's sequences.
        devices: that shared the training.
    """
    speed = flops_per_token(model, seen_length(lengths)) * tokens_per_second
    most = peak(next(model.parameters()).device, causal_model(model).config.dtype)
    return {"flops_per_second": speed} | ({} if most is None else {"mfu": speed / (most * devices)})
