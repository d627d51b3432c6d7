"""Sums of low-rank matrices: sum_i c_i B_i A_i of one layer, its norm, its truncated SVD.

A sum of few terms stays factors, stacked: [c_1 B_1, c_2 B_2 ...] [A_1; A_2; ...]. Once the ranks together reach the
smaller side of the matrix, the factors say no more than the matrix does, and it is held dense.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

STACK = 1024
"""Ranks together that are multiplied at once when a sum is dense: what bounds the memory for the factors."""

FAINT = 1e-4
"""Where a truncation loses less than this share of a matrix's squared norm, fp32 products say too little about what is
lost (they square the singular values), and the exact SVD works in fp64. Above it fp32 loses less than 1e-6 of the norm
more than the best truncation does."""

SETTLED = 2e-3
"""The randomised SVD ends when another pass would lower the squared error by less than this share of it."""

PASSES = 12
"""Passes after which the randomised SVD gives up and the exact one is taken: singular values that are almost equal."""

NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding errors of fp32."""


@dataclass(frozen=True)
class Term:
    """B diag(c) A with B [d_out, r] and A [r, d_in]."""

    c: float | Tensor
    """One number, or one for each column of B [r]."""
    B: Tensor
    A: Tensor


@dataclass(frozen=True)
class LowRank:
    """B A with B [d_out, K] and A [K, d_in]."""

    B: Tensor
    A: Tensor

    def dense(self) -> Tensor:
        return self.B @ self.A


Matrix = LowRank | Tensor


def add_up(
    terms: Iterable[Term], d_out: int, d_in: int, *, dtype: torch.dtype = torch.float32, limit: int | None = None
) -> Matrix:
    """sum_i c_i B_i A_i.

    Args:
        terms: read once; no more of them are held than make up `limit` or `STACK` ranks.
        dtype: of the arithmetic and of the result.
        limit: the sum stays factors while its ranks together are below this; min(d_out, d_in) by default.
    """
    limit = min(d_out, d_in) if limit is None else limit
    total: Tensor | None = None
    waiting: list[Term] = []
    rank = 0
    for term in terms:
        waiting.append(term)
        rank += len(term.A)
        if rank >= max(limit, STACK):
            total, waiting, rank = _added(total, waiting, d_out, d_in, dtype), [], 0
    if total is None and rank < limit:
        return stacked(waiting, d_out, d_in, dtype)
    return _added(total, waiting, d_out, d_in, dtype)


def stacked(terms: list[Term], d_out: int, d_in: int, dtype: torch.dtype = torch.float32) -> LowRank:
    """The terms side by side."""
    rank = sum(len(term.A) for term in terms)
    b, a = torch.empty(d_out, rank, dtype=dtype), torch.empty(rank, d_in, dtype=dtype)
    start = 0
    for term in terms:
        rows = slice(start, start + len(term.A))
        c = term.c.to(dtype) if isinstance(term.c, Tensor) else term.c
        torch.mul(term.B, c, out=b[:, rows]) if term.B.dtype is dtype else b[:, rows].copy_(term.B).mul_(c)
        a[rows] = term.A
        start = rows.stop
    return LowRank(b, a)


def side_by_side(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of n silos, B [n, d_out, r] and A [n, r, d_in], as those of their sum: [d_out, n r] and [n r, d_in]."""
    return b.transpose(0, 1).flatten(1), a.flatten(0, 1)


def _added(total: Tensor | None, terms: list[Term], d_out: int, d_in: int, dtype: torch.dtype) -> Tensor:
    """total + the terms: one product over all their ranks."""
    stack = stacked(terms, d_out, d_in, dtype)
    if total is None:
        return stack.dense()
    return total.addmm_(stack.B, stack.A)


def plus(matrix: Matrix, other: Matrix, sign: float = 1.0) -> Matrix:
    """matrix + sign * other, as factors if both are and their ranks together are below the smaller side."""
    if isinstance(matrix, LowRank) and isinstance(other, LowRank):
        d_out, d_in = len(matrix.B), matrix.A.shape[1]
        if len(matrix.A) + len(other.A) < min(d_out, d_in):
            return LowRank(torch.cat([matrix.B, sign * other.B], dim=1), torch.cat([matrix.A, other.A]))
    total = matrix.dense() if isinstance(matrix, LowRank) else matrix.clone()
    if isinstance(other, LowRank):
        return total.addmm_(other.B, other.A, alpha=sign)
    return total.add_(other, alpha=sign)


def squared_norm(matrix: Matrix) -> float:
    """|matrix|_F^2. Of factors it is trace((B' B) (A A')) in fp64: where terms cancel, the norm is right to about 1e-8
    of the terms' own."""
    if isinstance(matrix, LowRank):
        b, a = matrix.B.double(), matrix.A.double()
        return max(float(((b.t() @ b) * (a @ a.t())).sum()), 0.0)
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)


def truncated(matrix: Matrix, rank: int, *, generator: torch.Generator | None = None) -> LowRank:
    """The best approximation by a rank: B = U_r S_r [d_out, r], A = V_r' [r, d_in] with orthonormal rows, the largest
    singular values first (fp32).

    It has fewer rows than `rank` where the matrix itself has a smaller rank.

    Args:
        generator: given, the SVD is a randomised one that starts from its draws (Halko, Martinsson, Tropp, 2011):
            faster, and in practice within 1.01 times the best error.
    """
    if generator is not None and (found := _randomised(matrix, rank, generator)):
        return found
    if isinstance(matrix, LowRank) and len(matrix.A) <= min(len(matrix.B), matrix.A.shape[1]) // 3:
        return _by_qr(matrix, rank)
    return _by_eigh(matrix.dense() if isinstance(matrix, LowRank) else matrix, rank)


def _by_qr(matrix: LowRank, rank: int) -> LowRank:
    """B = Q R, A' = P T: U S V' of the small R T', turned by Q and P. In fp64, without a product of B and A."""
    q, r = torch.linalg.qr(matrix.B.double())
    p, t = torch.linalg.qr(matrix.A.double().t())
    u, s, v = torch.linalg.svd(r @ t.t(), full_matrices=False)
    keep = _significant(s, rank)
    return LowRank((q @ (u[:, :keep] * s[:keep])).float(), (v[:keep] @ p.t()).float())


def _by_eigh(w: Tensor, rank: int) -> LowRank:
    """The eigenvectors of W W' (or of W' W, if that is smaller) are U (or V)."""
    wide = w.shape[0] <= w.shape[1]
    side = w if wide else w.t()
    values, vectors = torch.linalg.eigh(side @ side.t())
    if float(values[:-rank].clamp(min=0).sum()) < FAINT * float(values.clamp(min=0).sum()):
        side = side.double()
        values, vectors = torch.linalg.eigh(side @ side.t())
    # U_r U_r' W is the best approximation as soon as U_r spans the right space, however its columns are mixed.
    basis = vectors[:, -rank:].flip(1)
    return _orthonormal_rows(basis, basis.t() @ side, transposed=not wide)


def _randomised(matrix: Matrix, rank: int, generator: torch.Generator) -> LowRank | None:
    """Subspace iteration from a random start, in rank + max(8, rank / 2) dimensions, until the error settles."""
    d_out, d_in = (len(matrix.B), matrix.A.shape[1]) if isinstance(matrix, LowRank) else matrix.shape
    size = min(rank + max(8, rank // 2), d_out, d_in)
    basis = torch.randn(d_in, size, generator=generator)
    before = 0.0
    for _ in range(PASSES):
        left = torch.linalg.qr(_times(matrix, basis)).Q  # [d_out, size]
        right = _transposed_times(matrix, left)  # [d_in, size]: right' = left' W
        basis, small = torch.linalg.qr(right)
        energy = torch.linalg.svdvals(small.double()).square()
        captured, missed = float(energy[:rank].sum()), float(energy[rank:].sum())
        # What the extra dimensions see is a part of the error, so the error is at least that.
        if captured - before <= SETTLED * missed or missed <= NEGLIGIBLE**2 * captured:
            u, s, v = torch.linalg.svd(small.t().double(), full_matrices=False)  # left' W = small' basis'
            keep = _significant(s, rank)
            return LowRank((left.double() @ (u[:, :keep] * s[:keep])).float(), (v[:keep] @ basis.double().t()).float())
        before = captured
    return None


def _times(matrix: Matrix, vectors: Tensor) -> Tensor:
    return matrix.B @ (matrix.A @ vectors) if isinstance(matrix, LowRank) else matrix @ vectors


def _transposed_times(matrix: Matrix, vectors: Tensor) -> Tensor:
    return matrix.A.t() @ (matrix.B.t() @ vectors) if isinstance(matrix, LowRank) else matrix.t() @ vectors


def _orthonormal_rows(basis: Tensor, rows: Tensor, *, transposed: bool) -> LowRank:
    """basis @ rows = U S V', from an orthonormal basis [d, r] and its rows [r, n]; transposed: of rows' @ basis'."""
    p, t = torch.linalg.qr(rows.double().t())
    u, s, v = torch.linalg.svd(t.t(), full_matrices=False)
    keep = _significant(s, rows.shape[0])
    left, right = basis.double() @ u[:, :keep], v[:keep] @ p.t()
    if transposed:
        left, right = right.t(), left.t()
    return LowRank((left * s[:keep]).float(), right.float())


def _significant(s: Tensor, rank: int) -> int:
    """How many of the first singular values (descending) are more than rounding."""
    return int((s[:rank] > NEGLIGIBLE * s[0]).sum()) if len(s) and float(s[0]) > 0 else 0
