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


@lru_cache(maxsize=16)  # a batch has a few shapes; long masks on a GPU take megabytes each
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


def short_attention(
    q: Tensor, k: Tensor, v: Tensor, grids: list[Grid], places: Tensor, scale: float, window: int | None
) -> Tensor:
    """q [T, heads, d], k and v [T, kv heads, d] -> [T, heads, d].

    Args:
        places: int64 [T]: where each row is in the grids' rows laid end to end.
        window: how many tokens, its own among them, a query sees at most.
    """
    return _ShortAttention.apply(q, k, v, grids, places, scale, window)  # type: ignore[no-any-return,no-untyped-call]


class _ShortAttention(torch.autograd.Function):
    """With S = scale q k' + mask, P = softmax(S), o = P v:  dv = P' do,  dS = P (do v' - rowsum(P do v')),
    dq = scale dS k,  dk = scale dS' q. Ancestors' dk and dv are summed over the segments that see them."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grids: list[Grid],
        places: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor:
        outs, saved = _Rows(grids, places, q), []
        for grid in grids:
            qs, ks, vs = _queries(q, grid, k.shape[1]), _keys(k, grid), _keys(v, grid)
            scores = torch.bmm(qs.float(), ks.float().transpose(1, 2)).mul_(scale)
            cells = scores.view(len(scores), -1, grid.length, ks.shape[1])
            cells += _hidden(grid.length, len(grid.ancestors), window)
            p = torch.softmax(scores, -1).to(q.dtype)
            outs.put(torch.bmm(p, vs).view(k.shape[1], grid.segments, -1, grid.length, q.shape[2]))
            saved += [qs, ks, vs, p]
        ctx.save_for_backward(*saved)
        ctx.grids, ctx.places, ctx.scale, ctx.kv_heads = grids, places, scale, k.shape[1]
        return outs.gather()

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        heads, saved = ctx.kv_heads, ctx.saved_tensors  # read once: checkpointing recomputes them here
        d = do.shape[2]
        dq, dk, dv = (_Rows(ctx.grids, ctx.places, x) for x in (do, do[:, :heads], do[:, :heads]))
        for i, grid in enumerate(ctx.grids):
            qs, ks, vs, p = saved[4 * i : 4 * i + 4]
            dos = _queries(do, grid, heads, zero_padding=True)
            dp = torch.bmm(dos, vs.transpose(1, 2))
            ds = torch._softmax_backward_data(dp.float(), p.float(), -1, torch.float32).mul_(ctx.scale).to(do.dtype)
            dq.put(torch.bmm(ds, ks).view(heads, grid.segments, -1, grid.length, d))
            for total, part in ((dk, torch.bmm(ds.transpose(1, 2), qs)), (dv, torch.bmm(p.transpose(1, 2), dos))):
                by_segment = part.view(heads, grid.segments, 1, -1, d)
                before = len(grid.ancestors)
                total.put(by_segment[:, :, :, before:])
                if before:
                    total.add(grid.ancestors, by_segment[:, :, 0, :before].sum(1, dtype=torch.float32).transpose(0, 1))
        return dq.gather(), dk.gather(), dv.gather(), None, None, None, None


class _Rows:
    """Collects the grids' results and gives them back in the packed row's order."""

    def __init__(self, grids: list[Grid], places: Tensor, like: Tensor) -> None:
        size = sum(len(grid.rows) for grid in grids)
        self.buffer = torch.empty(size, *like.shape[1:], dtype=like.dtype)
        self.places, self.filled = places, 0
        self.sums: list[tuple[Tensor, Tensor]] = []

    def put(self, part: Tensor) -> None:
        """The next grid's result [kv heads, n, heads per kv head, Q, d]."""
        heads, n, group, q, d = part.shape
        slot = self.buffer[self.filled : self.filled + n * q].view(n, q, heads, group, d)
        slot.copy_(part.permute(1, 3, 0, 2, 4))
        self.filled += n * q

    def add(self, rows: Tensor, part: Tensor) -> None:
        """What to add to these rows of the packed row, each once: fp32 [rows, kv heads, d]."""
        self.sums.append((rows, part))

    def gather(self) -> Tensor:
        out = self.buffer.index_select(0, self.places)
        for rows, part in self.sums:
            out[rows] = (out[rows] + part).to(out.dtype)
        return out


def _queries(x: Tensor, grid: Grid, kv_heads: int, *, zero_padding: bool = False) -> Tensor:
    """[T, heads, d] -> [kv heads * n, heads per kv head * Q, d]."""
    d = x.shape[2]
    rows = x.index_select(0, grid.rows)
    if zero_padding:
        rows.index_fill_(0, grid.padding, 0)
    rows = rows.view(grid.segments, grid.length, kv_heads, -1, d)
    return rows.permute(2, 0, 3, 1, 4).reshape(kv_heads * grid.segments, -1, d)


def _keys(x: Tensor, grid: Grid) -> Tensor:
    """[T, kv heads, d] -> [kv heads * n, P + Q, d]."""
    n, heads, d = grid.segments, x.shape[1], x.shape[2]
    own = x.index_select(0, grid.rows).view(n, grid.length, heads, d).permute(2, 0, 1, 3)
    if len(grid.ancestors) == 0:
        return own.reshape(heads * n, -1, d)
    before = x.index_select(0, grid.ancestors).transpose(0, 1)[:, None].expand(heads, n, -1, d)
    return torch.cat([before, own], 2).view(heads * n, -1, d)
