"""Attention over ordinary padded rows as `short_attention` computes it, where rows are short and on a CPU.

Padding at the end of a row is in every real token's future, so a causal mask alone serves all rows, and what padding
computes is read by nobody. All other calls (long rows, a cache, padding at the beginning, other patterns, a model's own
additions to attention) go to transformers' `sdpa` as before; the values are the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fedlm.training.attention import SHORT, causal_model
from fedlm.training.packing import Grid
from fedlm.training.short_attention import short_attention, visible

NAME = "fedlm_padded"
OWN = ("softcap", "s_aux", "position_bias", "cache")
"""What a model may add to attention, and `short_attention` does not know."""


def padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [n, heads, T, d], key and value [n, kv heads, S, d] -> [n, T, heads, d]."""
    n, _, length, d = query.shape
    causal = others.get("is_causal") is not False and getattr(module, "is_causal", True)
    if (
        query.device.type != "cpu"
        or not causal
        or key.shape[2] != length
        or length > SHORT
        or dropout
        or any(others.get(name) is not None for name in OWN)
        or (attention_mask is not None and not _plainly_causal(attention_mask, sliding_window))
    ):
        plain: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return plain
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    scale = d**-0.5 if scaling is None else scaling
    grid = _rows(n, length)
    out = short_attention(q.to(v.dtype), k.to(v.dtype), v, [grid], grid.rows, scale, sliding_window)
    return out.view(n, length, *out.shape[1:]), None


def _plainly_causal(mask: Tensor, window: int | None) -> bool:
    """Whether every real token sees itself and all tokens before it, within the window: so there is no padding before
    it, nor another pattern. bool [n, 1, T, T], of which the diagonal says what is real."""
    if mask.dtype != torch.bool or mask.shape[1] != 1:
        return False
    seen = mask[:, 0]
    padding = ~seen.diagonal(dim1=1, dim2=2)
    expected = visible(seen.shape[1], 0, window, seen.device)
    return bool(((seen == expected) | padding[:, :, None]).all())


@lru_cache(maxsize=64)
def _rows(n: int, length: int) -> Grid:
    """n rows side by side."""
    rows, none = torch.arange(n * length), torch.arange(0)
    return Grid(none, rows, rows, none, n)


AttentionInterface.register(NAME, padded_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def short_rows(model: nn.Module) -> Iterator[None]:
    """Inside, a model that attends by `sdpa` computes short padded rows so; any other is left as it is."""
    inner = causal_model(model)
    if inner.config._attn_implementation != "sdpa":
        yield
        return
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation("sdpa")
