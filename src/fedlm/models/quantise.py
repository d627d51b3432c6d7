"""Frozen base weights in four bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fedlm.errors import MissingExtra, ModelError

DEVICES = ("cuda",)


def four_bit(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What transformers must be told to load linear layers in NF4, 4-bit values that are equally likely where weights
    are normal, with one fp32 scale for 64 of them (QLoRA: Dettmers et al., NeurIPS 2023, section 3), and to multiply in
    `dtype`. Embeddings and norms stay in `dtype`.

    Raises:
        ModelError: the device is no NVIDIA GPU.
        MissingExtra: bitsandbytes or accelerate is not installed.
    """
    if device.type not in DEVICES:
        raise ModelError(
            f"4-bit weights need an NVIDIA GPU (CUDA), and this model's device is '{device.type}'",
            where="quantise",
            fix="leave `quantise` out where there is no GPU: in model, or in federation.capacity for single silos",
        )
    if find_spec("bitsandbytes") is None or find_spec("accelerate") is None:
        raise MissingExtra("a base in 4 bits", "gpu4bit")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config, "device_map": {"": device}}
