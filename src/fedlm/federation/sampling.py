"""Who takes part in a round: keyed by (seed, "sample", round) alone, so a resumed run samples the same silos."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedlm.randomness import numpy_generator
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import FederationSpec


def wanted(spec: FederationSpec, total: int) -> int:
    """How many replies a round wants from `total` silos: all, a count (at most all), or a fraction (at least one)."""
    if spec.sample == "all":
        return total
    if isinstance(spec.sample, int):
        return min(spec.sample, total)
    return max(1, round(spec.sample * total))


def updates_per_round(spec: FederationSpec, total: int) -> int:
    """How many updates a round's server step is made of."""
    asynchronous = ALGORITHMS[spec.algorithm.name].asynchronous
    return spec.algorithm.updates_per_step() if asynchronous else wanted(spec, total)


def invited(spec: FederationSpec, total: int) -> int:
    """How many silos are asked at once, over-sampling included; never more than there are."""
    if ALGORITHMS[spec.algorithm.name].asynchronous:
        return total if spec.concurrency == "all" else min(spec.concurrency, total)
    return min(total, math.ceil(wanted(spec, total) * (1.0 + spec.oversample) - 1e-9))


def quorum(spec: FederationSpec, sampled: int) -> int:
    """How many of `sampled` wanted replies must be good, else the round fails."""
    return max(1, math.ceil(spec.quorum * sampled - 1e-9))


def sample(silos: Sequence[str], count: int, seed: int, *purpose: str | int) -> list[str]:
    """`count` different silos in canonical (sorted) order, each subset equally likely.

    Floyd's method: time and memory grow with `count`, not with the number of silos.

    >>> sample(["a", "b", "c"], 3, 0, "sample", 1)
    ['a', 'b', 'c']
    """
    if count >= len(silos):
        return sorted(silos)
    generator = numpy_generator(seed, *purpose)
    chosen: set[int] = set()
    for top in range(len(silos) - count, len(silos)):
        candidate = int(generator.integers(0, top + 1))
        chosen.add(top if candidate in chosen else candidate)
    return sorted(silos[index] for index in chosen)
