"""Per-example gradients of layers that Opacus has no rule for, in its registry.

A rule is given a layer, the input of one call and the gradient of its output, both [n, ...], and returns the gradients
of the layer's parameters [n, *shape].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedlm.errors import MissingExtra
from fedlm.models.square import Square

Rule = Callable[[Any, list[Tensor], Tensor], dict[Tensor, Tensor]]


def gradient_rules(model: nn.Module) -> dict[type, Rule]:
    """Opacus' rules and ours for layers that this model has.

    Raises:
        MissingExtra: Opacus is not installed.
    """
    try:
        from opacus.grad_sample import GradSampleHooks
        from opacus.grad_sample.utils import register_grad_sampler
    except ImportError as error:
        raise MissingExtra("private training", "privacy") from error
    rules: dict[type, Rule] = GradSampleHooks.GRAD_SAMPLERS
    for module in model.modules():
        kind = type(module)
        if kind in rules:
            continue
        if kind is Square:
            register_grad_sampler(kind)(square_gradients)
        elif kind.__name__.endswith("RMSNorm") and _epsilon(module) is not None:
            register_grad_sampler(kind)(rms_norm_gradients)
    return rules


def norm_rules() -> dict[type, Rule]:
    """Opacus' rules for the norms [n] of per-example gradients that are never formed."""
    from opacus.grad_sample import GradSampleHooksFastGradientClipping

    found: dict[type, Rule] = GradSampleHooksFastGradientClipping.NORM_SAMPLERS
    return found


def applied(rule: Rule, layer: Any, x: Tensor, dy: Tensor, *parameters: nn.Parameter) -> list[Tensor]:
    """What a rule gives for these parameters of a layer. Opacus' rules pass over those that do not require gradients,
    as all do while a pass is taken down; here they do."""
    before = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    try:
        with torch.no_grad():
            found = rule(layer, [x], dy)
    finally:
        for p, required in zip(parameters, before, strict=True):
            p.requires_grad_(required)
    return [found[p] for p in parameters]


def rms_norm_gradients(layer: Any, inputs: list[Tensor], dy: Tensor) -> dict[Tensor, Tensor]:
    """y = w n or (1 + w) n with n = x (mean(x^2) + eps)^-1/2, as transformers' families have it: dw = sum dy n."""
    x = inputs[0].float()
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + _epsilon(layer))
    return {layer.weight: torch.einsum("n...d,n...d->nd", dy.float(), normed)}


def _epsilon(layer: Any) -> Any:
    found = getattr(layer, "variance_epsilon", None)
    return getattr(layer, "eps", None) if found is None else found


def square_gradients(layer: Square, inputs: list[Tensor], dy: Tensor) -> dict[Tensor, Tensor]:
    """y = B R h of LoRA-SB: dR = (B' dy) h' and dB = dy (R h)'."""
    h = inputs[0]
    return {
        layer.R: torch.einsum("n...i,n...j->nij", dy @ layer.B.to(dy.dtype), h),
        layer.B: torch.einsum("n...i,n...j->nij", dy, h @ layer.R.to(h.dtype).t()),
    }
