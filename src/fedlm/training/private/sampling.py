"""Which examples, or users, take part in a private step: each by itself with the same probability, whatever the others
do.

Amplification by sampling is proved for exactly this draw (Abadi et al., CCS 2016, section 3; Mironov, Talwar and Zhang,
2019). Shuffled batches of a fixed size are another mechanism, which costs more privacy than such a proof says.

Or in a fixed cyclic order, for DP-FTRL, which counts on no sampling but on how far apart a unit's steps are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import TrainingError

Indices = NDArray[np.int64]


def poisson_batches(units: int, rate: float, steps: int, generator: np.random.Generator) -> Iterator[Indices]:
    """Numbers, in rising order, of the units (examples, or users) of each of `steps` steps. A batch may be empty: its
    step is noise.

    Whoever knows the draws knows who took part, so `generator` must be the silo's secret.

    Args:
        units: how many there are.
        rate: the probability q with which each takes part in a step.
        steps: fixed beforehand; what is drawn never changes their number.

    Raises:
        TrainingError: the rate is no probability above 0, or there are no steps or units.
    """
    if not 0.0 < rate <= 1.0:
        raise TrainingError(f"the sampling rate is {rate}, and must be above 0 and at most 1")
    if steps < 1 or units < 1:
        raise TrainingError(f"private training needs steps and examples, and has {steps} and {units}")
    return (np.flatnonzero(generator.random(units) < rate).astype(np.int64) for _ in range(steps))


def cyclic_batches(units: int, batches: int, first: int, steps: int, order: np.random.Generator) -> Iterator[Indices]:
    """Numbers, in rising order, of the units of steps `first` up to `first + steps`: all units lie in so many batches,
    once and for all, and step t takes batch t modulo their number. No two batches differ by more than one unit.

    Args:
        order: of the units; the same generator afresh in every round gives the same batches.

    Raises:
        TrainingError: there are no steps, or more batches than units.
    """
    if steps < 1 or not 1 <= batches <= units or first < 0:
        raise TrainingError(f"{units} examples cannot be taken in {batches} batches over {steps} steps from {first}")
    parts = [np.sort(part).astype(np.int64) for part in np.array_split(order.permutation(units), batches)]
    return (parts[step % batches] for step in range(first, first + steps))


def rows_by_user(users: NDArray[np.int64]) -> list[Indices]:
    """By user, in the order in which they first appear, the numbers of their examples.

    Args:
        users: of each example, whose it is.
    """
    _, first, owners = np.unique(users, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))[owners]
    order = np.argsort(rank, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(np.bincount(rank))[:-1])


def some_rows(rows: Indices, most: int, generator: np.random.Generator) -> Indices:
    """At most so many of a user's examples, uniformly without replacement, in rising order. The user's bound holds
    whatever is drawn."""
    if len(rows) <= most:
        return rows
    return np.sort(generator.choice(rows, most, replace=False))
