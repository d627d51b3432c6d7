"""LoRA's linear layers as one autograd function each, and one for the layers that read the same input.

PEFT computes W x + s B A x as five recorded operations and lifts the activations to the adapter's fp32 first. Here the
frozen W has no gradient to record, A and B are cast to the activations' dtype instead, and the A's of q, k, v (and of
gate, up) are one matrix. The numbers are those of PEFT under autocast: bit for bit the same products, rounded alike.

PEFT's modules stay where they are; only their `forward` is replaced inside `fused_lora()`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from fedlm.models.deltas import Delta

log = logging.getLogger(__name__)

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Children that read the same tensor, in calling order. If a model calls them otherwise, each is computed by itself."""


class _Linears(torch.autograd.Function):
    """y_i = x W_i' + b_i + s_i (x A_i') B_i' for layers i that share x [T, in].

    Of factors that are not trained nothing is kept: neither x for A nor x A' for B.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases, a_s, b_s = _columns(tensors)
        a = torch.cat([a.to(x.dtype) for a in a_s])
        b = [(b * s).to(x.dtype) for b, s in zip(b_s, scales, strict=True)]
        h = x @ a.t()
        outs = []
        for part, w, bias, bb in zip(torch.split(h, [len(m) for m in a_s], 1), weights, biases, b, strict=True):
            y = x @ w.t() if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())
            outs.append(y.addmm_(part, bb.t()))
        ctx.trains_a, ctx.trains_b = (any(ctx.needs_input_grad[first::4]) for first in (4, 5))
        ctx.save_for_backward(x if ctx.trains_a else None, h if ctx.trains_b else None, a, *b, *weights)
        ctx.scales = scales
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        n = len(dys)
        x, h, a, *rest = ctx.saved_tensors
        b, weights = rest[:n], rest[n:]
        dh = torch.cat([dy @ bb for dy, bb in zip(dys, b, strict=True)], 1)
        ranks = [bb.shape[1] for bb in b]
        da = torch.split((dh.t() @ x).float(), ranks) if ctx.trains_a else [None] * n
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dh @ a
            for dy, w in zip(dys, weights, strict=True):
                dx.addmm_(dy, w)
        grads: list[Tensor | None] = []
        parts = torch.split(h, ranks, 1) if ctx.trains_b else [None] * n
        for i, part in enumerate(parts):
            db = None if part is None else (part.t() @ dys[i]).t().float().mul_(ctx.scales[i])
            grads += [None, None, da[i], db]
        return dx, None, *grads


def _columns(tensors: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    return tensors[0::4], tensors[1::4], tensors[2::4], tensors[3::4]


class _Group:
    """Layers that read one input: the first call computes all, the siblings take theirs."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def call(self, index: int, x: Tensor) -> Tensor:
        if self.input is x and index in self.waiting:
            out = self.waiting.pop(index)
        else:
            outs = _linears(x, self.layers)
            self.input, self.waiting = x, dict(enumerate(outs))
            out = self.waiting.pop(index)
        if not self.waiting:
            self.input = None
        return out


def _linears(x: Tensor, layers: list[Any]) -> list[Tensor]:
    scales, tensors = [], []
    for layer in layers:
        adapter = layer.active_adapters[0]
        base = layer.get_base_layer()
        scales.append(layer.scaling[adapter])
        tensors += [base.weight, base.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    flat = x.reshape(-1, x.shape[-1]).to(tensors[0].dtype)
    outs = _Linears.apply(flat, tuple(scales), *tensors)  # type: ignore[no-untyped-call]
    return [y.view(*x.shape[:-1], -1) for y in outs]


def unfit(layer: Any) -> str | None:
    """Why this LoRA layer must be left to PEFT, or None."""
    base = layer.get_base_layer()
    adapters = layer.active_adapters
    if len(adapters) != 1 or adapters[0] not in layer.lora_A:
        return "not exactly one active adapter"
    name = adapters[0]
    if type(base) is not nn.Linear:
        return f"base layer is {type(base).__name__}"
    if base.weight.requires_grad:
        return "base weight is trained too"
    if layer.merged or layer.disable_adapters:
        return "adapter merged or disabled"
    if name in layer.lora_variant or layer.lora_bias[name]:
        return "a variant of LoRA"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "adapter dropout"
    hooks = [h for m in layer.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    if layer.training and not all(isinstance(hook, Delta) for hook in hooks):
        return "hooks"
    return None


_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def fused_lora(model: nn.Module) -> Iterator[int]:
    """Inside, plain LoRA layers run fused; gives their number. Others stay PEFT's, and the log says why."""
    with ExitStack() as stack:
        grouped: dict[int, tuple[_Group, int]] = {}
        found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}
        reasons = {name: "a subclass" if type(m) is not LoraLinear else unfit(m) for name, m in found.items()}
        left = {name: reason for name, reason in reasons.items() if reason}
        if left:
            name, reason = next(iter(left.items()))
            if model not in _told:  # once, not every round
                _told.add(model)
                log.warning("%d LoRA layers run unfused, for instance %s: %s", len(left), name, reason)
        fit = {name: m for name, m in found.items() if name not in left}
        for name in fit:
            parent, _, child = name.rpartition(".")
            for family in SIBLINGS:
                names = [f"{parent}.{c}" for c in family]
                if child == family[0] and all(n in fit for n in names) and _alike([fit[n] for n in names]):
                    group = _Group([fit[n] for n in names])
                    grouped |= {id(fit[n]): (group, i) for i, n in enumerate(names)}
        for layer in fit.values():
            group, index = grouped.get(id(layer), (_Group([layer]), 0))
            layer.forward = _forward(group, index)
            stack.callback(layer.__dict__.pop, "forward")
        yield len(fit)


def _alike(layers: list[Any]) -> bool:
    weights = [m.get_base_layer().weight for m in layers]
    return len({(w.shape[1], w.dtype) for w in weights}) == 1


def _forward(group: _Group, index: int) -> Any:
    layer = group.layers[index]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs:
            raise TypeError("a fused LoRA layer takes the input alone")
        if layer.disable_adapters:  # for a while: what a run began with is asked for in the middle of a step
            return cast(Tensor, LoraLinear.forward(layer, x))
        return group.call(index, x)

    return forward
