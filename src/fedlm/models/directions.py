"""Full weights described by a few scalars along random directions that everybody can draw again.

A *description* is one tensor. It says how the weights w [d] (all parameters laid end to end, in the model's order)
follow from the base's w0:

    directions.scalars      [n]         w = w0 - sum_i a_i z_i, with z_i [d] standard normal
    directions.coordinates  [n, L, k]   w = w0 + sum_i sum_l sum_j c_ilj v_ilj, with v_ilj uniform in +-1/sqrt(d_l) on
                                        block l, one of L equal ones (of d_l weights), and 0 elsewhere

The terms of the first axis are added one after another, in fp32: whoever has base, seed and description has the same
weights, bit for bit where processors agree, and whoever holds the weights of the first terms may go on from there.
Directions are keyed by the run's seed and their place in the description, drawn on the CPU whatever the device, and
never held: `BLOCK` numbers at a time exist.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator

SCALARS = "directions.scalars"
COORDINATES = "directions.coordinates"
BLOCK = 1 << 17
"""Numbers drawn at a time: 512 KiB, which stay in cache. Part of what a direction is: another size, other numbers."""


def is_description(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these tensors describe the weights rather than hold them."""
    return tensors.keys() in ({SCALARS}, {COORDINATES})


def direction(seed: int, number: int) -> torch.Generator:
    """What draws z_i, i = `number`, for the run's seed."""
    return torch_generator(seed, "direction", number)


@torch.no_grad()
def move(weights: Mapping[str, Tensor], drawn: torch.Generator, alpha: float) -> None:
    """w += alpha z in place, z [d] standard normal from a generator at its start."""
    numbers = torch.empty(BLOCK)
    for part in _EndToEnd(weights).parts():
        z = numbers[: len(part)].normal_(generator=drawn)
        part.add_(z.to(part.device), alpha=alpha)


@torch.no_grad()
def add_terms(weights: Mapping[str, Tensor], description: Tensors, seed: int, done: int = 0) -> None:
    """Turn the weights of a description's first `done` terms (of none: the base's) into those of all its terms.

    Args:
        weights: fp32, every trained parameter, in the model's order; changed in place.
    """
    ((name, terms),) = description.items()
    for number in range(done, len(terms)):
        if name == COORDINATES:
            _add_coordinates(weights, terms[number], seed, number)
        elif scalar := float(terms[number]):
            move(weights, direction(seed, number), -scalar)


@torch.no_grad()
def project(delta: Mapping[str, Tensor], seed: int, number: int, blocks: int, per_block: int) -> Tensor:
    """Coordinates c [L, k] of a difference of weights, whose sum of c_lj v_lj is an unbiased estimate of it.

    c_lj = <v_lj, delta_l> / (rho_l k) with rho_l = 1 / (3 d_l), the variance of an entry of v_lj.

    Raises:
        ModelError: there are more blocks than weights.
    """
    found, numbers, whole = torch.zeros(blocks, per_block), torch.empty(BLOCK), _EndToEnd(delta)
    for block, (start, stop) in enumerate(whole.blocks(blocks)):
        drawn, bound = _basis(seed, number, block), (stop - start) ** -0.5
        for j in range(per_block):
            inner = 0.0
            for part in whole.parts(start, stop):
                v = numbers[: len(part)].uniform_(-bound, bound, generator=drawn)
                inner += float(torch.dot(part, v.to(part.device)))
            found[block, j] = inner * 3 * (stop - start) / per_block
    return found


def _add_coordinates(weights: Mapping[str, Tensor], coordinates: Tensor, seed: int, number: int) -> None:
    numbers, whole = torch.empty(BLOCK), _EndToEnd(weights)
    for block, (start, stop) in enumerate(whole.blocks(len(coordinates))):
        drawn, bound = _basis(seed, number, block), (stop - start) ** -0.5
        for coordinate in coordinates[block].tolist():
            for part in whole.parts(start, stop):
                v = numbers[: len(part)].uniform_(-bound, bound, generator=drawn)
                part.add_(v.to(part.device), alpha=coordinate)


def _basis(seed: int, number: int, block: int) -> torch.Generator:
    """What draws the k vectors v_lj of a block, one after another."""
    return torch_generator(seed, "basis", number, block)


class _EndToEnd:
    """All weights as one vector that is never made."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._flat = [tensor.detach().view(-1) for tensor in weights.values()]
        self._starts = list(accumulate((len(flat) for flat in self._flat), initial=0))

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Views of at most `BLOCK` weights, from `start` to `stop`, each within one tensor."""
        end = self._starts[-1] if stop is None else stop
        for i in range(bisect_right(self._starts, start) - 1, len(self._flat)):
            low, high = max(start - self._starts[i], 0), min(end - self._starts[i], len(self._flat[i]))
            if high <= 0:
                return
            for first in range(low, high, BLOCK):
                yield self._flat[i][first : min(first + BLOCK, high)]

    def blocks(self, count: int) -> Iterator[tuple[int, int]]:
        """Where each of `count` blocks begins and ends; their sizes differ by one at most."""
        size = self._starts[-1]
        if count > size:
            raise ModelError(f"{size} weights cannot be cut into {count} blocks")
        for block in range(count):
            yield block * size // count, (block + 1) * size // count
