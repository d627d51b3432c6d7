"""Which examples make each optimiser step. Depends on the keys alone, never on processes or threads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from fedlm.randomness import numpy_generator
from fedlm.recipe.schema import TrainingSpec

Indices = NDArray[np.int64]
BUCKET_BATCHES = 8
"""Without packing, examples are sorted by length inside a shuffled window of this many batches, then shuffled."""


def steps_per_round(spec: TrainingSpec, examples: int) -> int:
    """Optimiser steps of one round over this many sequences."""
    return math.ceil(_sequences(spec, examples) / min(spec.batch_size, examples))


def _sequences(spec: TrainingSpec, examples: int) -> int:
    """Sequences that one round goes through, repetitions counted."""
    if spec.steps is not None:
        return spec.steps * min(spec.batch_size, examples)
    assert spec.epochs is not None
    return max(1, round(spec.epochs * examples))


def batches(
    spec: TrainingSpec, lengths: NDArray[np.int64], key: tuple[str | int, ...], round_: int
) -> Iterator[Indices]:
    """Sequence numbers of each optimiser step of a round.

    Sequences come in one keyed permutation after another, so every one is seen n times before any is seen n + 2 times:
    within each round with `order: rounds`, over all rounds of the run with `order: stream`, where a round begins where
    the one before it ends. That place depends on the round's number alone; what a silo leaves out, because it was not
    asked or ran out of time, is not made up for.

    `key` is (seed, silo, ...). A silo with fewer sequences than `batch_size` uses them all in each step.
    """
    n, size = len(lengths), min(spec.batch_size, len(lengths))
    total = _sequences(spec, n)
    seed, parts = int(key[0]), key[1:]
    if spec.order == "stream":
        first = round_ * total
        stream = _stretch(n, first, total, lambda epoch: numpy_generator(seed, "stream", *parts, epoch))
    else:
        stream = _stretch(n, 0, total, lambda epoch: numpy_generator(seed, "batches", *parts, round_, epoch))
    if spec.packing:
        yield from (stream[i : i + size] for i in range(0, total, size))
        return
    shuffle = numpy_generator(seed, "buckets", *parts, round_)
    window = size * BUCKET_BATCHES
    for start in range(0, total, window):
        inside = stream[start : start + window]
        inside = inside[np.argsort(lengths[inside], kind="stable")]
        cut = [inside[i : i + size] for i in range(0, len(inside), size)]
        yield from (cut[i] for i in shuffle.permutation(len(cut)))


def _stretch(n: int, first: int, total: int, generator: Callable[[int], np.random.Generator]) -> Indices:
    """`total` places of permutations of n laid end to end, from place `first` on.

    Args:
        generator: of an epoch's permutation.
    """
    epochs = range(first // n, math.ceil((first + total) / n))
    orders = [generator(epoch).permutation(n) for epoch in epochs]
    start = first - epochs.start * n
    return np.concatenate(orders)[start : start + total]
