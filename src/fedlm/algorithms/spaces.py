"""Where updates are compared and combined: as they travel, or as the changes s (B_i A_i - B A) of LoRA's products.

Both give inner products, combinations sum_i c_i u_i and rules on coordinates, reading a part of every silo's update at
a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlm.algorithms import pairwise
from fedlm.algorithms.base import Algorithm
from fedlm.algorithms.flexlora import filled
from fedlm.algorithms.gathered import Gathered
from fedlm.algorithms.lora import Trained, factors_of
from fedlm.algorithms.lowrank import LowRank, Matrix, Term, add_up, plus, side_by_side, truncated
from fedlm.algorithms.merged import merged
from fedlm.algorithms.pairwise import Vector
from fedlm.errors import RunError
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator

ELEMENTS = 1 << 21
"""Values of all silos together that are read at once: 8 MiB, and twice as much in fp64."""

LARGEST = 1e30
"""Values of a dense product beyond this count as this: a bad silo's factors may be so large that fp32 overflows."""

Coordinates = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""A rule on each coordinate by itself: [values, n], contiguous and not needed any more -> [values]."""


class Factors:
    """Updates as they travel: one vector of all tensors, in sorted order of their names."""

    def __init__(self, method: Algorithm, parameters: Tensors, gathered: Gathered) -> None:
        self.method, self.parameters, self.gathered = method, parameters, gathered
        self.layout = gathered.kept[0].layout
        self.size = sum(shape.numel() for _, shape in self.layout.values())

    def spans(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """Parts of the vector of which so many rows, by default one for each update, are read at once."""
        return self.gathered.spans(list(self.layout), max(1, ELEMENTS // (rows or len(self.gathered.kept))))

    def gram(self) -> pairwise.Matrix:
        """<u_i, u_j> [n, n]."""
        return pairwise.gram((self.gathered.block(*span) for span in self.spans()), len(self.gathered.kept))

    def squares(self) -> Vector:
        """|u_i|^2 [n]."""
        total = np.zeros(len(self.gathered.kept))
        for span in self.spans():
            x = self.gathered.block(*span).numpy().astype(np.float64)
            total += np.einsum("ij,ij->i", x, x)
        return total

    def inner(self, k: int) -> Vector:
        """<u_i, u_k> [n]."""
        total = np.zeros(len(self.gathered.kept))
        for span in self.spans():
            x = self.gathered.block(*span).numpy().astype(np.float64)
            total += x @ x[k]
        return total

    def combined(self, c: Vector) -> Tensor:
        """sum_i c_i u_i as one vector, fp32, summed in fp64. Updates that count nothing are not read."""
        among = np.flatnonzero(c).tolist()
        whole = torch.zeros(self.size)
        for start, end in self.spans(max(1, len(among))) if among else ():
            x = self.gathered.block(start, end, among).numpy().astype(np.float64)
            whole[start:end] = torch.from_numpy(c[among] @ x)
        return whole

    def stepped(self, whole: Tensor) -> Tensors:
        """The parameters moved by eta times this vector."""
        moved = {
            name: torch.add(
                self.parameters[name], whole[start : start + shape.numel()].view(shape), alpha=self.method.server_lr
            )
            for name, (start, shape) in self.layout.items()
        }
        return self.parameters | moved

    def moved(self, c: Vector) -> Tensors:
        """The parameters after a step by sum_i c_i u_i."""
        return self.stepped(self.combined(c))

    def moved_by(self, rule: Coordinates, among: Sequence[int] | None = None) -> Tensors:
        """The parameters after a step by a rule on coordinates of these updates (by default all)."""
        whole = torch.empty(self.size)
        for start, end in self.spans():
            x = self.gathered.block(start, end, among).numpy()
            whole[start:end] = torch.from_numpy(rule(np.ascontiguousarray(x.T)))
        return self.stepped(whole)


class Products:
    """Updates as what they change: dW_i = s (B_i A_i - B A) of every LoRA layer, and other tensors as they travel.

    Inner products need no dW: <B_i A_i, B_j A_j> = trace((B_j' B_i) (A_i A_j')), in fp64, with the global B A as one
    more silo. The new product is put back as the factors nearest to it, and what they miss is merged beside the frozen
    weights as fp32 deltas (see `fedlm.algorithms.merged`), so that nothing is lost.
    """

    def __init__(self, method: Algorithm, parameters: Tensors, gathered: Gathered, round_: int) -> None:
        self.method, self.parameters, self.gathered, self.round = method, parameters, gathered, round_
        self.trained = Trained(method, (parameters, {}), gathered, round_)
        layered = {name for layer in self.trained.layers for name in factors_of(layer)}
        self.others = [name for name in gathered.kept[0].layout if name not in layered]
        """Tensors beside the factors: those of a head."""
        self.scale = method.adapter.scale(method.adapter.rank)

    def gram(self) -> pairwise.Matrix:
        """<dW_i, dW_j> [n, n], summed over layers and other tensors."""
        n = len(self.gathered.kept)
        total = pairwise.gram(self._other_blocks(), n)
        for layer in self.trained.layers:
            total += self.scale**2 * self._layer(layer)
        return total

    def squares(self) -> Vector:
        """|dW_i|^2 [n]."""
        n = len(self.gathered.kept)
        total = np.zeros(n)
        for block in self._other_blocks():
            total += np.einsum("ij,ij->i", x := block.numpy().astype(np.float64), x)
        for layer in self.trained.layers:
            b, a = self._global(layer)
            whole, first = float(_inner(b, a, b, a)[0, 0]), 0
            for _, b_n, a_n in self.trained.silos(layer):
                for b_i, a_i in zip(b_n, a_n, strict=True):
                    own, shared = _inner(b_i[None], a_i[None], b_i[None], a_i[None]), _inner(b_i[None], a_i[None], b, a)
                    total[first] += self.scale**2 * max(float(own[0, 0] - 2 * shared[0, 0]) + whole, 0.0)
                    first += 1
        return total

    def inner(self, k: int) -> Vector:
        """<dW_i, dW_k> [n]."""
        total = np.zeros(len(self.gathered.kept))
        for block in self._other_blocks():
            x = block.numpy().astype(np.float64)
            total += x @ x[k]
        for layer in self.trained.layers:
            b, a = self._global(layer)
            chunks = [(b_n, a_n) for _, b_n, a_n in self.trained.silos(layer)]
            b_k, a_k = (torch.cat([chunk[part] for chunk in chunks])[k][None] for part in (0, 1))
            mine = np.concatenate([_inner(*chunk, b_k, a_k)[:, 0] for chunk in chunks])
            shared = np.concatenate([_inner(*chunk, b, a)[:, 0] for chunk in chunks])
            total += self.scale**2 * (mine - shared - _inner(b_k, a_k, b, a)[0, 0] + _inner(b, a, b, a)[0, 0])
        return total

    def moved(self, c: Vector) -> Tensors:
        """The parameters after a step by sum_i c_i dW_i."""
        eta, rest = self.method.server_lr, 1.0 - self.method.server_lr * float(c.sum())

        def changes() -> Iterator[tuple[str, Matrix]]:
            for layer, shape in self.trained.layers.items():
                yield layer, add_up(terms(layer), *shape)

        def terms(layer: str) -> Iterator[Term]:
            """s B A + eta sum_i c_i s (B_i A_i - B A)."""
            if abs(rest) > 1e-12:  # coefficients that sum to 1 up to rounding leave nothing of B A
                b, a = self._global(layer)
                yield Term(rest * self.scale, b[0], a[0])
            first = 0
            for silos, b_n, a_n in self.trained.silos(layer):
                here = c[first : first + len(silos)]
                first += len(silos)
                if len(among := np.flatnonzero(here).tolist()):
                    share = torch.from_numpy(eta * self.scale * here[among])[:, None, None]
                    yield Term(1.0, *side_by_side(*_balanced(b_n[among], a_n[among], share)))

        return self._put_back(changes()) | self._others_moved(lambda x: x @ c)

    def moved_by(self, rule: Coordinates, among: Sequence[int] | None = None) -> Tensors:
        """The parameters after a step by a rule on coordinates of these silos' products (by default all).

        A rule on coordinates that moves along with its values finds the same for B_i A_i as for their changes.
        """
        n, eta = len(self.gathered.kept), self.method.server_lr
        among = range(n) if among is None else among

        def changes() -> Iterator[tuple[str, Matrix]]:
            for layer, (d_out, d_in) in self.trained.layers.items():
                chunks = [(b_n, a_n) for _, b_n, a_n in self.trained.silos(layer)]
                b_n, a_n = (torch.cat([chunk[part] for chunk in chunks])[list(among)] for part in (0, 1))
                b, a = self._global(layer)
                change, rows = torch.empty(d_out, d_in), max(1, ELEMENTS // (len(among) * d_in))
                for start in range(0, d_out, rows):
                    dense = b_n[:, start : start + rows] @ a_n  # [n, rows, d_in]
                    dense = dense.nan_to_num(0.0, LARGEST, -LARGEST).clamp_(-LARGEST, LARGEST)
                    values = np.ascontiguousarray(dense.flatten(1).numpy().T)
                    change[start : start + rows] = torch.from_numpy(rule(values)).view(-1, d_in)
                change.mul_(eta * self.scale)
                yield layer, change if eta == 1 else change.addmm_(b[0], a[0], alpha=(1 - eta) * self.scale)

        def others(x: NDArray[np.float32]) -> NDArray[np.float32]:
            return rule(np.ascontiguousarray(x[:, list(among)]))

        return self._put_back(changes()) | self._others_moved(others)

    def _put_back(self, products: Iterator[tuple[str, Matrix]]) -> Tensors:
        """New factors with these products [d_out, d_in] s B A, as near as their rank allows, and the rest as deltas.

        Raises:
            RunError: a product is beyond fp32's range, so those that the rule goes by are bad.
        """
        rank, seed = self.method.adapter.rank, self.gathered.kept[0].place.seed
        factors: Tensors = {}

        def rests() -> Iterator[tuple[str, Matrix]]:
            for layer, product in products:
                a, b = factors_of(layer)
                parts = (product.B, product.A) if isinstance(product, LowRank) else (product,)
                if not all(bool(part.isfinite().all()) for part in parts):
                    raise RunError(
                        f"what '{self.method.spec.name}' makes of the silos' products is beyond fp32's range",
                        where=layer,
                        fix="most silos, or the one that is trusted, send absurd values: find out which",
                    )
                head, rest = divided(product, rank, torch_generator(seed, "robust", layer, self.round))
                best = filled(head, self.parameters[a])
                factors[a], factors[b] = best.A, best.B / self.scale
                yield layer, rest

        stepped = merged(self.parameters, rests(), str(self.round), self.method.spec.recompress)
        return stepped | factors

    def _others_moved(self, rule: Callable[[NDArray[np.float32]], NDArray[np.floating]]) -> Tensors:
        """Tensors that are no factors, moved by a rule on their values [values, n]."""
        moved: Tensors = {}
        for name in self.others:
            start, shape = self.gathered.kept[0].layout[name]
            x = self.gathered.block(start, start + shape.numel()).numpy()
            change = torch.from_numpy(np.asarray(rule(np.ascontiguousarray(x.T)), dtype=np.float32)).view(shape)
            moved[name] = torch.add(self.parameters[name], change, alpha=self.method.server_lr)
        return moved

    def _other_blocks(self) -> Iterator[Tensor]:
        for span in self.gathered.spans(self.others, ELEMENTS // len(self.gathered.kept) or 1):
            yield self.gathered.block(*span)

    def _global(self, layer: str) -> tuple[Tensor, Tensor]:
        """B [1, d_out, r] and A [1, r, d_in] that the silos began with."""
        a, b = factors_of(layer)
        return self.parameters[b][None].float(), self.parameters[a][None].float()

    def _layer(self, layer: str) -> pairwise.Matrix:
        """<B_i A_i - B A, B_j A_j - B A> [n, n] of one layer, a few silos against a few silos at a time."""
        chunks = [(b_n, a_n) for _, b_n, a_n in self.trained.silos(layer)] + [self._global(layer)]
        ends = np.cumsum([0, *(len(b) for b, _ in chunks)])
        p = np.empty((ends[-1], ends[-1]))
        for i, one in enumerate(chunks):
            for j, other in enumerate(chunks[: i + 1]):
                block = _inner(*one, *other)
                p[ends[i] : ends[i + 1], ends[j] : ends[j + 1]] = block
                p[ends[j] : ends[j + 1], ends[i] : ends[i + 1]] = block.T
        found: pairwise.Matrix = p[:-1, :-1] - p[:-1, -1:] - p[-1:, :-1] + p[-1, -1]
        return found


def space_of(method: Algorithm, parameters: Tensors, gathered: Gathered, round_: int) -> Factors | Products:
    """The space that the recipe's `robust_on` names."""
    if method.spec.robust_on == "product":
        return Products(method, parameters, gathered, round_)
    return Factors(method, parameters, gathered)


def divided(matrix: Matrix, rank: int, generator: torch.Generator) -> tuple[LowRank, Matrix]:
    """A matrix as factors of a rank and the rest. How near the factors come does not matter to the sum."""
    if isinstance(matrix, LowRank) and len(matrix.A) <= min(len(matrix.B), matrix.A.shape[1]) // 3:
        whole = truncated(matrix, len(matrix.A))  # the SVD of factors gives the rest as well, at its own rank
        return LowRank(whole.B[:, :rank], whole.A[:rank]), LowRank(whole.B[:, rank:], whole.A[rank:])
    head = truncated(matrix, rank, generator=generator)
    return head, plus(matrix, head, -1.0)


def _balanced(b: Tensor, a: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """share B and A [n, ...] with A of values of about 1, by powers of 2, which round nothing: of huge factors
    the share is so small that fp32 can only say it together with B, and squares of A would overflow."""
    powers = torch.frexp(a.abs().amax((1, 2), keepdim=True))[1].double().exp2()
    return (b.double() * share * powers).float(), (a.double() / powers).float()


def _inner(b: Tensor, a: Tensor, b2: Tensor, a2: Tensor) -> pairwise.Matrix:
    """<B_i A_i, B_j A_j> [n, m] in fp64 of B [n, d_out, r], A [n, r, d_in] and of m others of the same shapes."""
    n, m, r = len(b), len(b2), a.shape[1]
    same = b is b2 and a is a2
    left, right = _side(b), _side(a.transpose(1, 2))
    left2, right2 = (left, right) if same else (_side(b2), _side(a2.transpose(1, 2)))
    product = (left.T @ left2) * (right.T @ right2)
    found: pairwise.Matrix = product.reshape(n, r, m, r).sum((1, 3))
    return found


def _side(x: Tensor) -> NDArray[np.float64]:
    """[n, d, r] as [d, n r], fp64."""
    return x.double().transpose(0, 1).flatten(1).numpy()
