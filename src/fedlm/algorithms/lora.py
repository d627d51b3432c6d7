"""What methods on LoRA factors share: a round's updates one by one, the silos' own A_i and B_i, the aggregation error.

A layer of a silo of rank r_i adds s_i B_i A_i to its frozen weight, with s_i = alpha / r_i, or alpha / sqrt(r_i) with
rsLoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, Place
from fedlm.algorithms.lowrank import STACK, Term, add_up, plus, side_by_side, squared_norm
from fedlm.algorithms.stored import Kept, Stored
from fedlm.messages import Fields, Tensors
from fedlm.models.deltas import Pieces, pieces_of
from fedlm.recipe.methods import ALGORITHMS


class LoRAMethod(Algorithm):
    """Updates are of A and B, wait one by one, and are measured against the mean of the silos' changes.

    Methods differ in `server_step`; they find what silos trained in `Trained`.
    """

    summed = True
    """The server's step needs the weighted sum of the updates: they are all of one shape."""

    def accumulator(self, spool: Path) -> Accumulator:
        return Stored(spool, summed=self.summed)

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Stored)
        accumulator.keep(update, weight, place)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        """A and B of every layer, at the silo's rank."""
        shapes: dict[str, torch.Size] = {}
        for layer, (d_out, d_in) in layers_of(parameters).items():
            a, b = factors_of(layer)
            shapes[a], shapes[b] = torch.Size((place.rank, d_in)), torch.Size((d_out, place.rank))
        return shapes

    def measure(
        self, before: tuple[Tensors, Tensors], accumulator: Accumulator, after: tuple[Tensors, Tensors], round_: int
    ) -> Fields:
        """`aggregation_error`: |aggregate - mean|_F / |mean|_F over all layers, for the mean sum_i p_i s_i B_i A_i of
        what the silos trained and the aggregate that they load next. None for a method with personal models, whose
        silos load no aggregate, and where the mean is 0.

        Both are of the fp32 values that travel. On a bf16 base the silos' products round them further, in training and
        after it alike: see `fedlm.models.deltas`.

        The aggregate is that of the round's largest rank; with several ranks `error_by_rank` has them all. Where there
        are deltas, `deltas` says how far they have grown: pieces, bytes, the most ranks of factors in a layer, and how
        many layers have a dense one.
        """
        assert isinstance(accumulator, Stored)
        figures: Fields = {"aggregation_error": None}
        if not ALGORITHMS[self.spec.name].personal:
            errors = aggregation_errors(self, before, accumulator, after, round_)
            figures["aggregation_error"] = errors[max(errors)]
            if len(errors) > 1:
                figures["error_by_rank"] = {str(rank): error for rank, error in errors.items()}
        if pieces := pieces_of(after[0]):
            figures["deltas"] = grown(pieces)
        return figures


class Trained:
    """What the silos of a round trained, layer by layer, as the server sees it: what they began with and their updates.

    Args:
        method: whose silos they are.
        before: the global model and server state of the round.
        stored: the round's updates.
    """

    def __init__(self, method: Algorithm, before: tuple[Tensors, Tensors], stored: Stored, round_: int) -> None:
        self._method, self._before, self._stored, self._round = method, before, stored, round_
        self._starts: dict[int, Tensors] = {}
        self.layers = {
            layer: shape for layer, shape in layers_of(before[0]).items() if stored.weight_of(factors_of(layer)) > 0
        }
        """Those that any silo trained: [d_out, d_in] by name."""

    def silos(self, layer: str) -> Iterator[tuple[list[Kept], Tensor, Tensor]]:
        """In canonical order, several silos of one rank at once: their updates, and B_i [n, d_out, r] and
        A_i [n, r, d_in] after their training."""
        a, b = factors_of(layer)
        for silos, update in self._stored.read_together((a, b), STACK):
            start = self.start(silos[0].place)
            # A method that trains one factor sends no other.
            a_n, b_n = (
                update[name].add_(start[name]) if name in update else start[name].expand(len(silos), -1, -1)
                for name in (a, b)
            )
            yield silos, b_n, a_n

    def start(self, place: Place) -> Tensors:
        """What silos of this rank began the round with."""
        if place.rank not in self._starts:
            self._starts[place.rank] = loaded(self._method, self._before, place, self._round)
        return self._starts[place.rank]

    def shares(self, layer: str, silos: Sequence[Kept]) -> Tensor:
        """p_i of these silos [n], in fp64, among those that trained a layer."""
        weight = self._stored.weight_of(factors_of(layer))
        return torch.tensor([kept.weight / weight for kept in silos], dtype=torch.float64)

    def terms(self, layer: str) -> Iterator[Term]:
        """The mean change sum_i p_i s_i B_i A_i of a layer, over the silos that trained it."""
        for silos, b_n, a_n in self.silos(layer):
            rank = a_n.shape[1]
            c = self.shares(layer, silos) * self._method.adapter.scale(rank)
            yield Term(c.repeat_interleave(rank), *side_by_side(b_n, a_n))


def loaded(method: Algorithm, model: tuple[Tensors, Tensors], place: Place, round_: int) -> Tensors:
    """What a silo of this rank loads when a round's training begins, without state of its own: A and B of every layer
    (factors that never travel are those of the global model), and deltas."""
    received = method.for_rank(method.broadcast(*model, round_), place.rank)
    start = method.local(received, {}, replace(place, round=round_)).start()
    return {name: value for name, value in model[0].items() if ".lora_" in name} | start


def aggregation_errors(
    method: Algorithm, before: tuple[Tensors, Tensors], stored: Stored, after: tuple[Tensors, Tensors], round_: int
) -> dict[int, float | None]:
    """By rank of the round's silos, |aggregate - mean|_F / |mean|_F (see `LoRAMethod.measure`), in fp64."""
    trained = Trained(method, before, stored, round_)
    places = {kept.place.rank: kept.place for kept in stored.kept}
    old = {rank: loaded(method, before, place, round_) for rank, place in places.items()}
    new = {rank: loaded(method, after, place, round_ + 1) for rank, place in places.items()}
    deltas = {rank: (pieces_of(old[rank]), pieces_of(new[rank])) for rank in places}
    missed, whole = dict.fromkeys(places, 0.0), 0.0
    for layer, (d_out, d_in) in trained.layers.items():
        mean = add_up(trained.terms(layer), d_out, d_in, dtype=torch.float64)
        whole += squared_norm(mean)
        for rank, (was, now) in deltas.items():
            a, b = factors_of(layer)
            terms = [Term(method.adapter.scale(rank), new[rank][b], new[rank][a])]
            rest = mean
            for sign, here, there in ((1.0, now, was), (-1.0, was, now)):
                for piece, factors in here.get(layer, {}).items():
                    if _same(factors, there.get(layer, {}).get(piece)):
                        continue
                    if len(factors) == 2:
                        terms.append(Term(sign, *factors))
                    else:
                        rest = plus(rest, factors[0].double(), -sign)
            missed[rank] += squared_norm(plus(rest, add_up(terms, d_out, d_in, dtype=torch.float64), -1.0))
    return {rank: math.sqrt(missed[rank] / whole) if whole else None for rank in sorted(places)}


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...] | None) -> bool:
    """Pieces that no server step has touched."""
    if other is None or len(one) != len(other):
        return False
    return all(t is u or torch.equal(t, u) for t, u in zip(one, other, strict=True))


def grown(deltas: Pieces) -> Fields:
    """How far the deltas have grown."""
    pieces = [piece for layer in deltas.values() for piece in layer.values()]
    return {
        "pieces": len(pieces),
        "bytes": sum(tensor.nbytes for piece in pieces for tensor in piece),
        "rank": max(sum(len(p[1]) for p in layer.values() if len(p) == 2) for layer in deltas.values()),
        "dense_layers": sum(any(len(p) == 1 for p in layer.values()) for layer in deltas.values()),
    }


def factors_of(layer: str) -> tuple[str, str]:
    """The names of a layer's A and B."""
    return f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"


def layers_of(tensors: Tensors) -> dict[str, tuple[int, int]]:
    """[d_out, d_in] of every LoRA layer whose factors, or whose deltas, are among these tensors, sorted by name."""
    sides: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            sides.setdefault(name.removesuffix(".lora_A.weight"), [0, 0])[1] = tensor.shape[1]
        elif ".lora_B." in name:
            sides.setdefault(name.removesuffix(".lora_B.weight"), [0, 0])[0] = tensor.shape[0]
    for layer, pieces in pieces_of(tensors).items():
        if layer not in sides:
            first = next(iter(pieces.values()))
            sides[layer] = [len(first[0]), first[-1].shape[1]]
    return {layer: (sides[layer][0], sides[layer][1]) for layer in sorted(sides)}
