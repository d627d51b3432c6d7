"""What releases cost together: epsilon at a delta.

Two accountants of `dp-accounting`, each with what it covers:

| noise | sampling | add-or-remove, zero-out | replace |
|---|---|---|---|
| Gaussian | everyone | PLD, RDP | PLD, RDP |
| Gaussian | Poisson | PLD, RDP | PLD |
| Gaussian | fixed size, without replacement | none | RDP |
| distributed | everyone | RDP (zero-out only) | RDP |

PLD composes privacy loss distributions numerically, rounded up (Koskela et al. 2020; Doroshenko, Ghazi, Kamath, Kumar,
Manurangsi, "Connect the Dots", PETS 2022): tight. RDP composes Rényi divergences (Mironov, CSF 2017; conversion of
Canonne, Kamath, Steinke, NeurIPS 2020, proposition 12): an upper bound too, usually a looser one. What neither covers
is refused.

`dp-accounting` understands a noise multiplier under replace-one in two ways: its PLD accountant takes it over the bound
and doubles the sensitivity, its RDP accountant takes it over the sensitivity. A multiplier of fedlm is over the bound;
the RDP accountant gets half of it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy import distributed
from fedlm.privacy.mechanisms import (
    Adjacency,
    DistributedNoise,
    Everyone,
    FixedSize,
    Gaussian,
    Mechanism,
    Poisson,
    describe,
    noise_multiplier,
    times,
)

if TYPE_CHECKING:
    from dp_accounting import DpEvent, NeighboringRelation

ORDERS: tuple[float, ...] = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024, 2048)
"""Rényi orders: those of `dp-accounting`, with one more at the upper end for small epsilons."""

INTERVALS = ((1.0, 1e-4), (20.0, 5e-4), (math.inf, 1e-3))
"""Up to which epsilon privacy losses are rounded up to which step: arrays of millions of them, and seconds, where
epsilon is large, would buy its fifth digit."""


@dataclass(frozen=True)
class Spent:
    """What was spent at this delta, by each accountant that covers all of it; None where one does not."""

    delta: float
    pld: float | None
    rdp: float | None

    @property
    def epsilon(self) -> float:
        """The smaller: both are upper bounds."""
        return min(bound for bound in (self.pld, self.rdp) if bound is not None)


def spent(mechanisms: Iterable[Mechanism], delta: float) -> Spent:
    """What these releases cost together, in any order.

    What is released each time may depend on what was released before. The mechanisms (noise, sampling, count)
    must be fixed in advance for the PLD figure to hold; RDP's holds for any choice on the way (Feldman and Zrnic,
    "Individual Privacy Accounting via a Rényi Filter", NeurIPS 2021).

    Args:
        mechanisms: of one unit and adjacency; none at all cost nothing.
        delta: in (0, 1).

    Raises:
        PrivacyError: units or adjacencies differ, delta is none, or no accountant covers all of it.
    """
    check_delta(delta)
    composed = merged(mechanisms)
    if not composed:
        return Spent(delta, 0.0, 0.0)
    no_pld, no_rdp = _refusals(composed, not_in_pld), _refusals(composed, not_in_rdp)
    if no_pld and no_rdp:
        raise PrivacyError(
            f"no accountant covers this: PLD: {no_pld}; RDP: {no_rdp}",
            fix="count every unit as taking part (sampling Everyone, against zero-out or replace): an upper bound",
        )
    return Spent(
        delta,
        pld=None if no_pld else pld_epsilon(composed, delta),
        rdp=None if no_rdp else rdp_epsilon(composed, delta),
    )


def check_delta(delta: float) -> None:
    """Raises PrivacyError: delta is not within (0, 1)."""
    if not 0 < delta < 1:
        raise PrivacyError(f"delta is {delta}; it must be above 0 and below 1")


def merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal mechanisms as one with their counts added, in a canonical order.

    Raises:
        PrivacyError: their units or adjacencies differ: such epsilons say different things and cannot be added.
    """
    counts: dict[Mechanism, int] = {}
    for mechanism in mechanisms:
        noise_multiplier(mechanism)
        counts[times(mechanism, 1)] = counts.get(times(mechanism, 1), 0) + mechanism.count
    kinds = {(mechanism.unit, mechanism.adjacency) for mechanism in counts}
    if len(kinds) > 1:
        listed = " and ".join(f"{adjacency} of a {unit}" for unit, adjacency in sorted(kinds))
        raise PrivacyError(f"privacy against {listed} cannot be composed", fix="keep a ledger for each")
    return tuple(times(mechanism, count) for mechanism, count in sorted(counts.items(), key=repr))


def not_in_pld(mechanism: Mechanism) -> str | None:
    """Why the PLD accountant does not cover it; None where it does."""
    if isinstance(mechanism, DistributedNoise):
        return f"it knows no sums of {mechanism.noise} noise"
    if isinstance(mechanism.sampling, FixedSize) and not _samples_all(mechanism):
        return "it knows no sampling without replacement"
    return _unkept(mechanism)


def not_in_rdp(mechanism: Mechanism) -> str | None:
    """Why the RDP accountant does not cover it; None where it does."""
    if isinstance(mechanism, DistributedNoise) or _samples_all(mechanism):
        return None
    if isinstance(mechanism.sampling, Poisson) and mechanism.adjacency == "replace":
        return "it knows no Poisson sampling where a unit is replaced"
    # The proof compares a sample that holds the unit with one that holds another unit in its place.
    if isinstance(mechanism.sampling, FixedSize) and mechanism.adjacency != "replace":
        return "it knows sampling without replacement only where a unit is replaced (Wang, Balle, Kasiviswanathan 2019)"
    return _unkept(mechanism)


def pld_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """By privacy loss distributions.

    Gaussians without sampling are one Gaussian together, whose epsilon is exact (Balle and Wang, ICML 2018).

    Raises:
        PrivacyError: `not_in_pld` says why.
    """
    import dp_accounting

    _check_covered(mechanisms, not_in_pld)
    adjacency = mechanisms[0].adjacency
    if all(_samples_all(mechanism) for mechanism in mechanisms):
        precision = sum(mechanism.count / noise_multiplier(mechanism) ** 2 for mechanism in mechanisms)
        moves = 2 if adjacency == "replace" else 1
        return float(dp_accounting.get_epsilon_gaussian(precision**-0.5 / moves, delta))
    about = 0.0 if _refusals(mechanisms, not_in_rdp) else rdp_epsilon(mechanisms, delta)
    interval = next(step for most, step in INTERVALS if about <= most)
    accountant = dp_accounting.pld.PLDAccountant(_neighbours(adjacency), interval)
    for mechanism in mechanisms:
        accountant.compose(_event(mechanism, half=False), mechanism.count)
    return float(accountant.get_epsilon(delta))


def rdp_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """By Rényi divergences.

    Raises:
        PrivacyError: `not_in_rdp` says why.
    """
    from dp_accounting import rdp

    _check_covered(mechanisms, not_in_rdp)
    total = np.zeros(len(ORDERS))
    for mechanism in mechanisms:
        total += mechanism.count * _renyi(times(mechanism, 1))
    return float(rdp.compute_epsilon(ORDERS, total, delta)[0])


@lru_cache(maxsize=256)
def _renyi(mechanism: Mechanism) -> NDArray[np.float64]:
    """Of one release at each of `ORDERS`."""
    if isinstance(mechanism, DistributedNoise):
        return distributed.renyi(mechanism, ORDERS)
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(ORDERS, _neighbours(mechanism.adjacency))
    # It warns of each order at which its series does not converge; such an order counts as infinite and is not used.
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        accountant.compose(_event(mechanism, half=mechanism.adjacency == "replace"))
    finally:
        log.setLevel(level)
    return np.asarray(accountant.rdp, dtype=np.float64)


def _event(mechanism: Mechanism, half: bool) -> DpEvent:
    """One release in `dp-accounting`'s terms; `half`: with half the noise multiplier."""
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(noise_multiplier(mechanism) / (2 if half else 1))
    if isinstance(mechanism, Gaussian) and not _samples_all(mechanism):
        if isinstance(mechanism.sampling, Poisson):
            return dp_accounting.PoissonSampledDpEvent(mechanism.sampling.rate, event)
        if isinstance(mechanism.sampling, FixedSize):
            size, population = mechanism.sampling.size, mechanism.sampling.population
            return dp_accounting.SampledWithoutReplacementDpEvent(population, size, event)
    return event


def _samples_all(mechanism: Mechanism) -> bool:
    """Every unit is in every release."""
    if isinstance(mechanism, DistributedNoise):
        return True
    match mechanism.sampling:
        case Poisson(rate=rate):
            return rate == 1
        case FixedSize(size=size, population=population):
            return size == population
    return True


def _neighbours(adjacency: Adjacency) -> NeighboringRelation:
    from dp_accounting import NeighboringRelation

    return {
        "add-or-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero-out": NeighboringRelation.REPLACE_SPECIAL,
        "replace": NeighboringRelation.REPLACE_ONE,
    }[adjacency]


def _unkept(mechanism: Gaussian) -> str | None:
    """Sampling that others may know gives no amplification."""
    if isinstance(mechanism.sampling, Everyone) or mechanism.sampling.secret or _samples_all(mechanism):
        return None
    return "sampling makes a release cheaper only while nobody learns who was sampled, and this sample is not secret"


def _refusals(mechanisms: Sequence[Mechanism], why: Callable[[Mechanism], str | None]) -> str:
    reasons = {reason: describe(mechanism) for mechanism in mechanisms if (reason := why(mechanism))}
    return ", and ".join(f"{reason} ({example})" for reason, example in reasons.items())


def _check_covered(mechanisms: Sequence[Mechanism], why: Callable[[Mechanism], str | None]) -> None:
    if refused := _refusals(mechanisms, why):
        raise PrivacyError(f"the accountant does not cover this: {refused}")
