"""What the trained layers read and received in one forward and backward pass, example by example.

A linear layer's gradient is the sum over tokens of (gradient of its output) x (its input); both are at hand during an
ordinary backward pass, so per-example gradients, or their norms alone, need no second one. The trained parameters are
switched off meanwhile: autograd then computes no gradient that is summed over examples, which nobody would read.

Small layers (LoRA's factors, norms, scales, prompts) are reduced to per-example gradients at once. Of large ones the
two factors are kept ("book-keeping": Bu et al., ICML 2023, arXiv 2210.00038); their norms and the clipped sum are
computed from them when all norms are known.

Three kinds of parameters are read by no layer of torch's: IA3's scales, which PEFT multiplies with by itself, and soft
prompts, which all sequences share. A prompt is a sum over its sequences, so the gradient of each sequence's copy is
caught where the copy is made and taken through the prompt's encoder afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.ia3.layer import Linear as Ia3Linear
from torch import Tensor, nn
from torch.nn import Module, Parameter

from fedlm.errors import TrainingError
from fedlm.models.soft_prompts import SoftPromptModel
from fedlm.training.attention import causal_model
from fedlm.training.forward import model_device
from fedlm.training.fused_norm import fused_norms
from fedlm.training.padded_attention import short_rows
from fedlm.training.private.layers import applied, gradient_rules

LARGE = (nn.Linear, nn.Embedding)
"""Layers whose clipped sum follows from what they read and received."""


@dataclass
class Call:
    """One call of a large layer."""

    layer: Any
    x: Tensor
    """[n, T, d_in] fp32, or of an embedding ids [n, T]."""
    dy: Tensor
    """[n, T, d_out] fp32."""


@dataclass
class Tape:
    """What a pass over n examples left."""

    rules: dict[type, Any]
    names: dict[int, str]
    """By a parameter's id, its name."""
    tied: set[str]
    """Parameters of more than one layer."""
    books: Callable[[Call, bool], bool]
    """Whether a large layer's call is kept as it is, rather than reduced; told whether its weight is tied."""
    n: int = 0
    """Examples of the pass at hand; whoever begins one says so."""
    sequences: int = 0
    """Of all these examples."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Per-example gradients [n, *shape], fp32."""
    booked: dict[str, list[Call]] = field(default_factory=dict)
    """By weight, the calls that its gradient is the sum of."""
    prompt: Tensor | None = None
    """Of a soft prompt's rows, per-example gradients [n, tokens, width]."""
    rows: Tensor | None = None
    """int64 [sequences]: how many rows of each sequence the output layer reads, where it is not all."""

    def begin(self, n: int, sequences: int) -> None:
        self.n, self.sequences, self.rows, self.prompt = n, sequences, None, None
        self.kept.clear()
        self.booked.clear()

    def add(self, parameter: Parameter, gradients: Tensor) -> None:
        """Per-example gradients of one call [n, *shape]; calls add up."""
        name = self.names[id(parameter)]
        if name in self.kept:
            self.kept[name] += gradients
        else:
            self.kept[name] = gradients

    def take(self, layer: Any, x: Tensor, dy: Tensor, rows: Tensor | None) -> None:
        """One call of a layer: what it read, and the gradient of its output."""
        if type(layer) not in LARGE:
            self._reduce(layer, x.detach(), dy)
            return
        if rows is not None:
            x, dy = _unfolded(x, rows), _unfolded(dy, rows)
        dy = self._split(layer, dy, 2).float()
        if type(layer) is nn.Embedding:
            x = self._split(layer, x.detach(), 1).contiguous()  # Opacus takes a view
            if layer.padding_idx is not None:  # torch gives that row no gradient
                dy = dy * (x != layer.padding_idx)[..., None]
        else:
            x = self._split(layer, x.detach(), 2).float()
        bias, name = getattr(layer, "bias", None), self.names.get(id(layer.weight))
        if bias is not None and id(bias) in self.names:
            self.add(bias, dy.sum(1))
        if name is None:
            return
        call = Call(layer, x, dy)
        if name in self.booked or (name not in self.kept and self.books(call, name in self.tied)):
            self.booked.setdefault(name, []).append(call)
        else:
            self.add(layer.weight, *applied(self.rules[type(layer)], layer, x, dy, layer.weight))

    def _split(self, layer: Any, t: Tensor, last: int) -> Tensor:
        """[sequences, ...] as [n, all of an example's rows, ...]."""
        self._require_sequences(layer, t)
        return t.reshape(self.n, -1, *t.shape[t.ndim - last + 1 :])

    def _reduce(self, layer: Any, x: Tensor, dy: Tensor) -> None:
        self._require_sequences(layer, dy)
        trained = [p for p in layer.parameters(recurse=False) if id(p) in self.names]
        found = applied(self.rules[type(layer)], layer, x.float(), dy.float(), *trained)
        for parameter, gradients in zip(trained, found, strict=True):
            self.add(parameter, gradients.reshape(self.n, -1, *parameter.shape).sum(1))

    def _require_sequences(self, layer: Any, t: Tensor) -> None:
        if len(t) != self.sequences:
            name = next(self.names[id(p)] for p in layer.parameters() if id(p) in self.names)
            raise TrainingError(
                f"the layer of '{name}' reads {len(t)} rows, which are not those of {self.sequences} sequences",
                fix="train an adapter in place of the full weights",
            )


@contextmanager
def taped(model: Module, parameters: dict[str, Parameter], books: Callable[[Call, bool], bool]) -> Iterator[Tape]:
    """Inside, the model's passes are taken down. The parameters do not require gradients there, and their `.grad` is
    left alone.

    Raises:
        TrainingError: a parameter is in a layer without a rule, or in none.
        MissingExtra: Opacus is not installed.
    """
    rules, names = gradient_rules(model), {id(p): name for name, p in parameters.items()}
    with ExitStack() as stack:
        prompted = model if isinstance(model, SoftPromptModel) and not model.off else None
        scaled = {name: m for name, m in model.named_modules() if isinstance(m, Ia3Linear)}
        layers = _layers(model, names, [*scaled, *(["prompt_encoder"] if prompted is not None else [])])
        tape = Tape(rules, names, _tied(layers, names), books)
        for name, layer in layers.items():
            if type(layer) not in rules:
                raise TrainingError(
                    f"there is no rule for per-example gradients of {type(layer).__name__} ({name})",
                    fix="train an adapter in place of the full weights",
                )
            stack.callback(layer.register_forward_hook(_watch(tape, model, layer)).remove)
        for layer in scaled.values():
            _watch_scale(tape, layer, stack)
        inner = causal_model(model)
        stack.callback(inner.register_forward_pre_hook(_rows(tape), with_kwargs=True).remove)
        embedding = inner.get_input_embeddings()
        prefix = prompted is not None and prompted.spec.kind == "prefix"
        tokens = prompted.virtual_tokens if prompted is not None and not prefix else 0
        stack.callback(embedding.register_forward_hook(_begin(tape, tokens)).remove)
        if prompted is not None and prefix:
            prompted._cache = _cache(tape, prompted)  # type: ignore[method-assign]
            stack.callback(prompted.__dict__.pop, "_cache")
        for parameter in [p for p in model.parameters() if p.requires_grad]:
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        if model_device(model).type == "cpu":
            stack.enter_context(fused_norms(model))
            stack.enter_context(short_rows(model))
        yield tape


def through_encoder(model: SoftPromptModel, parameters: dict[str, Parameter], rows: Tensor) -> dict[str, Tensor]:
    """Per-example gradients [n, *shape] of a prompt's parameters, from those of its rows [n, tokens, width]."""
    values = list(parameters.values())
    for value in values:
        value.requires_grad_(True)
    with torch.enable_grad():
        made = model.rows()
    each = [torch.autograd.grad(made, values, one.view_as(made), retain_graph=True, allow_unused=True) for one in rows]
    for value in values:
        value.requires_grad_(False)
    found = {}
    for name, value, gradients in zip(parameters, values, zip(*each, strict=True), strict=True):
        found[name] = torch.stack([torch.zeros_like(value) if g is None else g for g in gradients])
    return found


def _layers(model: Module, names: dict[int, str], without: list[str]) -> dict[str, Module]:
    """The modules that hold a trained parameter themselves, by name."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=True):
        inside = any(name == other or name.startswith(f"{other}.") for other in without)
        if not inside and any(id(p) in names for p in module.parameters(recurse=False)):
            found[name] = module
    return found


def _tied(layers: dict[str, Module], names: dict[int, str]) -> set[str]:
    seen: list[str] = [names[id(p)] for m in layers.values() for p in m.parameters(recurse=False) if id(p) in names]
    return {name for name in seen if seen.count(name) > 1}


def _watch(tape: Tape, model: Module, layer: Module) -> Any:
    output = causal_model(model).get_output_embeddings()

    def hook(_: Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        (x,) = inputs
        rows = tape.rows if layer is output else None
        if not out.requires_grad:
            out.requires_grad_(True)
        out.register_hook(lambda dy: tape.take(layer, x, dy.detach(), rows))  # type: ignore[no-untyped-call]

    return hook


def _watch_scale(tape: Tape, layer: Any, stack: ExitStack) -> None:
    """IA3: y = l W x, so dl = sum dy (W x); of a feed-forward layer y = W (l x), so dl = sum d(l x) x."""
    (adapter,) = layer.active_adapters
    scale, base = layer.ia3_l[adapter], layer.get_base_layer()
    if any(id(p) in tape.names for p in base.parameters()):
        raise TrainingError("a layer below IA3's scales is trained too, for which there is no rule")
    read: list[Tensor] = []

    def take(gradient: Tensor, factor: Tensor) -> None:
        both = gradient.float() * factor.detach().float()
        tape.add(scale, both.reshape(tape.n, -1, scale.numel()).sum(1).view(tape.n, *scale.shape))

    def before(_: Module, inputs: tuple[Tensor, ...]) -> None:
        read[:] = inputs

    def below(_: Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if layer.is_feedforward:
            x, scaled = read[0], inputs[0]
            scaled.register_hook(lambda gradient: take(gradient, x))  # type: ignore[no-untyped-call]
        else:
            read[:] = [out]

    def after(_: Module, __: tuple[Tensor, ...], out: Tensor) -> None:
        if torch.is_grad_enabled() and not layer.is_feedforward:
            product = read[0]
            out.register_hook(lambda gradient: take(gradient, product))  # type: ignore[no-untyped-call]

    stack.callback(layer.register_forward_pre_hook(before).remove)
    stack.callback(base.register_forward_hook(below).remove)
    stack.callback(layer.register_forward_hook(after).remove)


def _rows(tape: Tape) -> Any:
    """Notes which rows the output layer will read: of each sequence those that predict a target."""

    def hook(_: Module, __: Any, inputs: dict[str, Any]) -> None:
        keep = inputs.get("logits_to_keep")
        tape.rows = keep.sum(1) if isinstance(keep, Tensor) and keep.dtype == torch.bool else None

    return hook


def _begin(tape: Tape, tokens: int) -> Any:
    """With nothing trained the graph would have no beginning; it begins at the embeddings."""

    def hook(_: Module, __: Any, out: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        if not out.requires_grad:
            out.requires_grad_(True)
        if tokens:
            out.register_hook(lambda dy: _add_prompt(tape, dy.detach()[:, :tokens]))  # type: ignore[no-untyped-call]

    return hook


def _add_prompt(tape: Tape, gradients: Tensor) -> None:
    """Gradients [sequences, tokens, width] of each sequence's copy of the prompt."""
    each = gradients.float().reshape(tape.n, -1, *gradients.shape[1:]).sum(1)
    tape.prompt = each if tape.prompt is None else tape.prompt + each


def _cache(tape: Tape, model: SoftPromptModel) -> Any:
    """In place of the model's own: every sequence has a copy of the prefix, whose gradient is caught."""
    from transformers import DynamicCache

    from fedlm.models.soft_prompts import kv_sizes

    def build(batch: int) -> Any:
        config = model.base_model.config
        layers, heads, size = kv_sizes(config)
        rows = model.rows().detach()
        copies = rows.expand(batch, *rows.shape).clone().requires_grad_(torch.is_grad_enabled())
        if copies.requires_grad:
            copies.register_hook(lambda dy: _add_prompt(tape, dy.detach()))  # type: ignore[no-untyped-call]
        cache = DynamicCache(config=config)
        parts = copies.view(batch, len(rows), layers, 2, heads, size).to(config.dtype)
        for layer in range(layers):
            cache.update(*(parts[:, :, layer, i].transpose(1, 2) for i in range(2)), layer)
        return cache

    return build


def _unfolded(t: Tensor, rows: Tensor) -> Tensor:
    """[all rows, d], of which each sequence has as many as `rows` says, as [sequences, most, d] with zeros behind."""
    real = torch.arange(int(rows.max()), device=t.device) < rows[:, None]
    out = t.new_zeros(*real.shape, t.shape[-1])
    out[real] = t.detach()
    return out
