"""Attention over a packed row: each segment sees its ancestors and, causally, itself.

Registered with transformers as the attention implementation 'fedlm_packed'; a model uses it only inside `packed()`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from fedlm.errors import FedlmError, ModelError
from fedlm.training.head import plain_head
from fedlm.training.packing import Packed, pack
from fedlm.training.prefixes import Prefix
from fedlm.training.sequences import Encoded
from fedlm.training.short_attention import short_attention, visible

NAME = "fedlm_packed"
SHORT = 256
"""On a CPU, segments up to this long attend by plain matrix products. torch's fused kernel is slower there (at 100
tokens a whole step takes 1.2 times as long); near 256 they are even, and beyond, the stored scores cost memory."""
_FIX = "set `training.packing: false`"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    packed: Packed,
    prefix: Prefix | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, d], key and value [1, kv heads, T, d] -> [1, T, heads, d]."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "cache") if others.get(name) is not None]
    if unknown:
        raise ModelError(f"packed attention does not know this model's {', '.join(unknown)}", fix=_FIX)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
    # Values come straight from a product; rotations in fp32 may have widened the others, which autocast does not undo.
    q, k = q.to(v.dtype), k.to(v.dtype)
    if prefix is not None:
        k, v = prefix.into(k, v, int(module.layer_idx))  # type: ignore[arg-type]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    longest = max(len(g.ancestors) + g.length for g in packed.grids)
    if q.device.type == "cpu" and dropout == 0.0 and longest <= SHORT:
        return short_attention(q, k, v, packed.grids, packed.places, scale, sliding_window)[None], None
    return _sdpa(q, k, v, packed, scale, sliding_window, dropout)[None], None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, batch: Packed, scale: float, window: int | None, dropout: float) -> Tensor:
    """torch's fused attention, grid by grid: [T, heads, d]."""
    parts = []
    for grid in batch.grids:
        n, wide, before = grid.segments, grid.length, len(grid.ancestors)
        keys = torch.cat([grid.ancestors.expand(n, before), grid.rows.view(n, wide)], 1)
        mask = None if before == 0 and window is None else visible(wide, before, window, q.device)
        kk, vv = k[keys], v[keys]
        if mask is not None and q.shape[1] != k.shape[1]:  # no fused kernel takes grouped heads and a mask together
            groups = q.shape[1] // k.shape[1]
            kk, vv = kk.repeat_interleave(groups, 2), vv.repeat_interleave(groups, 2)
        part = scaled_dot_product_attention(
            q[grid.rows].view(n, wide, *q.shape[1:]).transpose(1, 2),
            kk.transpose(1, 2),
            vv.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            dropout_p=dropout,
            enable_gqa=q.shape[1] != kk.shape[2],
        )
        parts.append(part.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[batch.places]


_eager: Any = torch.compiler.disable(packed_attention)  # type: ignore[no-untyped-call]  # shapes change with every batch
AttentionInterface.register(NAME, _eager)


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside, the model attends over packed rows (given as `packed=`); outside it is as it was.

    Raises:
        ModelError: a packed row gives other logits than its parts do, so this architecture cannot be packed.
    """
    inner = causal_model(model)
    before = inner.config._attn_implementation
    if before == NAME:
        yield
        return
    _switch(inner, NAME)
    try:
        _check(inner)
        yield
    finally:
        _switch(inner, before)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Inside of `packed`, the model attends over ordinary rows again."""
    inner = causal_model(model)
    if inner.config._attn_implementation != NAME:
        yield
        return
    _switch(inner, "sdpa")
    try:
        yield
    finally:
        _switch(inner, NAME)


def causal_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return unwrap() if unwrap is not None else model


def _switch(model: Any, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    if model.config._attn_implementation != implementation:
        raise ModelError(
            f"{type(model).__name__} does not let its attention be replaced, so it cannot be packed", fix=_FIX
        )


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.no_grad()
def _check(model: Any) -> None:
    """Compare two short sequences packed with a shared beginning with each by itself, once per model object.

    Architectures that mix tokens outside attention (state spaces, convolutions) would otherwise leak, silently.
    """
    if model in _checked:
        return
    embedding: Tensor = model.get_input_embeddings().weight
    generator = np.random.Generator(np.random.Philox(0))
    shared = generator.integers(0, len(embedding), 9)
    parts = []
    for extra in (5, 3):
        ids = np.concatenate([shared, generator.integers(0, len(embedding), extra)]).astype(np.int32)
        parts.append(Encoded(ids, np.arange(len(ids)) > 0))
    training = model.training
    model.eval()
    plain: list[Tensor] = []
    try:
        together = _logits(model, pack(parts).to(embedding.device), len(parts))
        alone = [_logits(model, pack([p]).to(embedding.device), 1)[0] for p in parts]
        _switch(model, "eager")
        plain_head(model)  # remembered; its probe needs ordinary attention
        for p in parts:
            row = torch.from_numpy(p.ids.astype(np.int64))[None].to(embedding.device)
            plain.append(model(input_ids=row, use_cache=False).logits[0, :-1].float())
    except FedlmError:
        raise
    except Exception as error:
        raise ModelError(
            f"packed attention does not fit {type(model).__name__} ({type(error).__name__})", fix=_FIX
        ) from error
    finally:
        _switch(model, NAME)
        model.train(training)
    loose = 0.05 if embedding.dtype != torch.float32 else 1e-3
    for joined, single, truth in zip(together, alone, plain, strict=True):
        scale = truth.abs().max().clamp_min(1e-6)
        if max((joined - truth).abs().max(), (single - truth).abs().max()) > loose * scale:
            raise ModelError(f"{type(model).__name__} gives a packed row other logits than its parts", fix=_FIX)
    _checked.add(model)


def _logits(model: Any, batch: Packed, sequences: int) -> list[Tensor]:
    logits = model(input_ids=batch.ids, position_ids=batch.positions, use_cache=False, packed=batch).logits[0]
    return [logits[batch.predictors[batch.owners == i]].float() for i in range(sequences)]
