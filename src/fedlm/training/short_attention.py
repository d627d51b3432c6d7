"""Attention for short sequences on a CPU, by plain batched matrix products with the backward pass written out.

torch's fused CPU kernel saves memory on long sequences; on short ones its backward pass takes several times as long.
Scores and softmax are fp32; the products with probabilities run in the activations' dtype, as in the fused kernel.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fedlm.training.packing import Grid


@lru_cache(maxsize=64)
def visible(length: int, before: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, before + length]: which ancestors and earlier tokens a query may see."""
    distance = torch.arange(before, before + length)[:, None] - torch.arange(before + length)[None, :]
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    return seen.to(device)


@lru_cache(maxsize=64)
def _hidden(length: int, before: int, window: int | None) -> Tensor:
    """What is added to the scores: 0 where visible, -inf elsewhere; fp32."""
    seen = visible(length, before, window, torch.device("cpu"))
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def short_attention(q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], scale: float, window: int | None) -> Tensor:
    """q [T, heads, d], k and v [T, kv heads, d] -> [T, heads, d]."""
    return _ShortAttention.apply(q, k, v, grids, scale, window)  # type: ignore[no-any-return,no-untyped-call]


class _ShortAttention(torch.autograd.Function):
    """With S = scale q k' + mask, P = softmax(S), o = P v:  dv = P' do,  dS = P (do v' - rowsum(P do v')),
    dq = scale dS k,  dk = scale dS' q. Ancestors' dk and dv are summed over the segments that see them."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], scale: float, window: int | None
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype)
        saved = []
        for grid in grids:
            qs, ks, vs = _queries(q, grid, k.shape[1]), _keys(k, grid), _keys(v, grid)
            scores = torch.bmm(qs.float(), ks.float().transpose(1, 2)).mul_(scale)
            cells = scores.view(len(scores), -1, grid.length, ks.shape[1])
            cells += _hidden(grid.length, len(grid.ancestors), window)
            p = torch.softmax(scores, -1).to(q.dtype)
            _put(out, torch.bmm(p, vs), grid, k.shape[1])
            saved += [qs, ks, vs, p]
        ctx.save_for_backward(*saved)
        ctx.grids, ctx.scale, ctx.shapes = grids, scale, (q.shape, k.shape)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        q_shape, k_shape = ctx.shapes
        heads = k_shape[1]
        dq = torch.empty(q_shape, dtype=do.dtype)
        dk, dv = torch.zeros(k_shape, dtype=do.dtype), torch.zeros(k_shape, dtype=do.dtype)
        saved = ctx.saved_tensors  # once: activation checkpointing recomputes them here
        for i, grid in enumerate(ctx.grids):
            qs, ks, vs, p = saved[4 * i : 4 * i + 4]
            dos = _queries(do, grid, heads)
            if grid.valid is not None:
                pad = torch.ones(len(grid.rows), dtype=torch.bool)
                pad[grid.valid] = False
                dos.view(heads, grid.segments, -1, grid.length, dos.shape[-1]).masked_fill_(
                    pad.view(1, grid.segments, 1, grid.length, 1), 0
                )
            dp = torch.bmm(dos, vs.transpose(1, 2))
            ds = torch._softmax_backward_data(dp.float(), p.float(), -1, torch.float32).mul_(ctx.scale).to(do.dtype)
            _put(dq, torch.bmm(ds, ks), grid, heads)
            _add(dk, torch.bmm(ds.transpose(1, 2), qs), grid, heads)
            _add(dv, torch.bmm(p.transpose(1, 2), dos), grid, heads)
        return dq, dk, dv, None, None, None


def _queries(x: Tensor, grid: Grid, kv_heads: int) -> Tensor:
    """[T, heads, d] -> [kv heads * n, heads per kv head * Q, d]."""
    d = x.shape[2]
    rows = x.index_select(0, grid.rows).view(grid.segments, grid.length, kv_heads, -1, d)
    return rows.permute(2, 0, 3, 1, 4).reshape(kv_heads * grid.segments, -1, d)


def _put(out: Tensor, part: Tensor, grid: Grid, kv_heads: int) -> None:
    """Write `_queries`' layout back to the rows it came from."""
    d = out.shape[2]
    rows = part.view(kv_heads, grid.segments, -1, grid.length, d).permute(1, 3, 0, 2, 4).reshape(-1, out.shape[1], d)
    if grid.valid is None:
        out.index_copy_(0, grid.rows, rows)
    else:
        out.index_copy_(0, grid.rows[grid.valid], rows[grid.valid])


def _keys(x: Tensor, grid: Grid) -> Tensor:
    """[T, kv heads, d] -> [kv heads * n, P + Q, d]."""
    n, heads, d = grid.segments, x.shape[1], x.shape[2]
    own = x.index_select(0, grid.rows).view(n, grid.length, heads, d).permute(2, 0, 1, 3)
    if len(grid.ancestors) == 0:
        return own.reshape(heads * n, -1, d)
    before = x.index_select(0, grid.ancestors).transpose(0, 1)[:, None].expand(heads, n, -1, d)
    return torch.cat([before, own], 2).view(heads * n, -1, d)


def _add(total: Tensor, part: Tensor, grid: Grid, kv_heads: int) -> None:
    """Add `_keys`' layout to the rows it came from; each own row comes once, ancestors once per segment."""
    d, before = total.shape[2], len(grid.ancestors)
    by_segment = part.view(kv_heads, grid.segments, -1, d)
    if before:
        summed = by_segment[:, :, :before].sum(1, dtype=torch.float32).to(total.dtype).transpose(0, 1)
        total.index_copy_(0, grid.ancestors, total.index_select(0, grid.ancestors) + summed)
    own = by_segment[:, :, before:].permute(1, 2, 0, 3).reshape(-1, kv_heads, d)
    rows = grid.rows if grid.valid is None else grid.rows[grid.valid]
    own = own if grid.valid is None else own[grid.valid]
    total.index_copy_(0, rows, total.index_select(0, rows) + own)
