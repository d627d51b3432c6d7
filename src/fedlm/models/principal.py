"""LoRA factors taken from the frozen weights: their principal singular part (PiSSA: Meng et al., NeurIPS 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.messages import Tensors
from fedlm.models.adapters import attach, lora_layers
from fedlm.models.load import load_base
from fedlm.recipe.schema import Recipe


def principal_tensors(recipe: Recipe) -> Tensors:
    """LoRA factors of every layer with s B A = U_r S_r V_r', the best approximation of the frozen weight by rank r.

    Loads the base model on the CPU and gives it up again.

    Raises:
        ModelError: see `load_base` and `attach`.
    """
    model = attach(load_base(recipe.model, device="cpu"), recipe.adapter, recipe.seed)
    scale, found = recipe.adapter.scale(recipe.adapter.rank), {}
    for name, layer in lora_layers(model).items():
        weight = layer.get_base_layer().weight.detach().float()
        a, b = principal_factors(weight.t() if layer.fan_in_fan_out else weight, recipe.adapter.rank, scale)
        found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"] = a, b
    return found


def principal_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A [r, d_in] and B [d_out, r] with scale * B A = U_r S_r V_r' of a weight [d_out, d_in].

    The sign of each pair of singular vectors is the one that makes the largest value of A's row positive, so that the
    factors do not depend on the solver's choice. Beyond the weight's own rank they are 0.
    """
    weight, wide = weight.double(), weight.shape[1] > weight.shape[0]
    small = weight @ weight.t() if wide else weight.t() @ weight
    values, vectors = torch.linalg.eigh(small)
    root = values.flip(0)[:rank].clamp(min=0).sqrt()  # singular values, the largest first
    side = vectors.flip(1)[:, :rank]  # U_r where wide, else V_r
    other = (weight.t() if wide else weight) @ side / root.clamp(min=1e-12)
    u, v = (side, other) if wide else (other, side)
    sign = torch.gather(v, 0, v.abs().argmax(0, keepdim=True)).sign()
    half = (root / scale).sqrt() * sign
    a, b = (v * half).t(), u * half
    short = rank - len(root)
    if short > 0:
        a, b = torch.cat([a, a.new_zeros(short, a.shape[1])]), torch.cat([b, b.new_zeros(len(b), short)], dim=1)
    return a.float().contiguous(), b.float().contiguous()
