"""Changes that a method merges into frozen weights, kept beside them as deltas that grow from round to round."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from fedlm.algorithms.lowrank import LowRank, Matrix, Term, add_up, plus, truncated
from fedlm.messages import Tensors
from fedlm.models.deltas import piece_name, pieces_of

DENSE = "sum"
"""The one dense piece of a layer, once factors would be larger."""


def dense_from(d_out: int, d_in: int) -> int:
    """The rank from which factors have as many values as the matrix."""
    return -(-d_out * d_in // (d_out + d_in))


def merged(
    parameters: Tensors, changes: Iterable[tuple[str, Matrix]], piece: str, recompress: int | None = None
) -> Tensors:
    """The parameters with changes [d_out, d_in], by layer, added to the layers' deltas.

    Factors become one more piece, so that earlier pieces keep their bits and need not travel again. Once all pieces of
    a layer together have as many values as a dense matrix, they are summed to one: nothing is lost but fp32's rounding.

    Args:
        piece: the new pieces' name.
        recompress: the rank to which the sum of a layer's pieces is cut where it is larger: the only way in which a
            delta loses anything.
    """
    stepped, deltas = dict(parameters), pieces_of(parameters)
    for layer, change in changes:
        old = deltas.get(layer, {})
        terms = [Term(1.0, *p) for p in old.values() if len(p) == 2]
        dense = [p[0] for p in old.values() if len(p) == 1]
        if isinstance(change, LowRank):
            if not len(change.A):
                continue
            terms.append(Term(1.0, change.B, change.A))
        else:
            dense.append(change)
        d_out, d_in = len(terms[-1].B if terms else dense[-1]), (terms[-1].A if terms else dense[-1]).shape[1]
        rank, full = sum(len(term.A) for term in terms), dense_from(d_out, d_in)
        most = full - 1 if recompress is None else min(recompress, full - 1)
        if not dense and rank <= most:
            _put(stepped, layer, piece, terms[-1].B, terms[-1].A)
            continue
        for name in old:
            for part in "ABW":
                stepped.pop(piece_name(layer, part, name), None)
        total = add_up(terms, d_out, d_in)
        for matrix in dense:
            total = plus(matrix, total)
        if recompress is not None and recompress < full:
            kept = truncated(total, recompress)
            _put(stepped, layer, piece, kept.B, kept.A)
        else:
            stepped[piece_name(layer, "W", DENSE)] = total.dense() if isinstance(total, LowRank) else total
    return stepped


def _put(parameters: Tensors, layer: str, piece: str, b: Tensor, a: Tensor) -> None:
    if len(a):
        parameters[piece_name(layer, "A", piece)] = a.contiguous()
        parameters[piece_name(layer, "B", piece)] = b.contiguous()
