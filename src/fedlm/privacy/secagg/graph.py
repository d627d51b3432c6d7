"""Who masks with whom: a k-regular graph over the silos, and the degree and threshold that make it safe.

After SecAgg+ (Bell, Bonawitz, Gascón, Lepoint and Raykova, CCS 2020, section 3): silos stand on a ring in random order
and each is a neighbour of the k/2 before and the k/2 behind it (a Harary graph). Pairwise masks and shares then go to k
neighbours in place of all. It is safe as long as, with overwhelming probability over the order,

1. no honest silo has as many corrupt neighbours as the threshold t: they could read its secrets;
2. honest silos that stay remain connected: else the sum falls into sums over the parts;
3. at least t neighbours of every silo stay: else the sum cannot be unmasked.

Unlike in the paper each silo also keeps a share of its own secrets, as in the complete graph of Bonawitz et al.
(CCS 2017, section 4): a secret has k + 1 holders. A silo that drops out takes its own share along and one that stays
gives out its self mask's alone, so 1 and 3 are counted over its neighbours, as if it held none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

from fedlm.errors import RunError

Neighbours = dict[str, frozenset[str]]
"""By silo, those it masks with; symmetric, never itself."""

MOST = 10_000
"""Silos in one aggregation."""

FEW = 32
"""Silos up to which `choose` takes the complete graph: it costs little, and asks for no trust in the seed."""


@dataclass(frozen=True)
class Risk:
    """What an aggregation must withstand.

    Attributes:
        dropout_rate: largest share of the silos that may drop out, delta in the paper. Both rates count in whole silos,
            rounded up.
        corruption_rate: largest share of the silos that may work together with the coordinator, gamma in the paper.
        security: bits: conditions 1 and 2 fail with probability 2^-security at most.
        correctness: bits: condition 3 fails with probability 2^-correctness at most.
        malicious: whether the coordinator may lie, too, and tell silos different lists of survivors.
    """

    dropout_rate: float
    corruption_rate: float
    security: int = 40
    correctness: int = 20
    malicious: bool = False


@dataclass(frozen=True)
class Design:
    """Degree k (n - 1 is the complete graph) and threshold t: shares that give a secret back."""

    degree: int
    threshold: int


def neighbours(silos: Collection[str], degree: int, seed: bytes) -> Neighbours:
    """The graph over these silos, the same for everyone who knows the seed.

    The order on the ring is that of SHA-256 over seed and name: a random permutation to whoever did not choose the
    seed after the names.

    Raises:
        RunError: there is no such graph: the degree is neither n - 1 nor even and between 2 and n - 2.
    """
    n = len(silos)
    if degree == n - 1:
        everyone = frozenset(silos)
        return {silo: everyone - {silo} for silo in silos}
    if degree % 2 or not 2 <= degree < n - 1:
        raise RunError(
            f"no ring of {n} silos gives each {degree} neighbours",
            fix="take n - 1 (the complete graph) or an even degree from 2 to n - 2",
        )
    ring = sorted(silos, key=lambda silo: hashlib.sha256(hashlib.sha256(seed).digest() + silo.encode()).digest())
    steps = [step for step in range(-degree // 2, degree // 2 + 1) if step]
    return {silo: frozenset(ring[(place + step) % n] for step in steps) for place, silo in enumerate(ring)}


def core(graph: Neighbours, present: Collection[str], threshold: int) -> frozenset[str]:
    """The present silos without those whose secrets fewer than `threshold` of the rest hold; they could never be
    unmasked. What is left may be empty."""
    left = frozenset(present)
    while lonely := {silo for silo in left if len(graph[silo] & left) + 1 < threshold}:
        left -= lonely
    return left


def choose(silos: int, risk: Risk) -> Design:
    """The smallest degree that is safe for so many silos, and a threshold for it.

    Of all safe thresholds the one nearest to a majority of a secret's holders is taken (at least two thirds with a
    malicious coordinator). Up to `FEW` silos get the complete graph, with the conditions of Bonawitz et al. (section
    6); any number does with a malicious coordinator, which could else choose a seed that puts corrupt silos around an
    honest one.

    Raises:
        RunError: no graph withstands this risk.
    """
    _check(silos, risk)
    for degree in range(2, silos - 1, 2) if silos > FEW and not risk.malicious else ():
        if not _stays_connected(silos, degree, risk):
            continue
        low, high = _lowest(silos, degree, risk), _highest(silos, degree, risk)
        if low <= high:
            return Design(degree, min(max(low, (degree + 1) // 2 + 1), high))
    low, high = _lowest(silos, silos - 1, risk), silos - _count(risk.dropout_rate, silos)
    if low > high:
        raise RunError(
            f"{silos} silos cannot aggregate safely: {low} must be there to unmask, and with a dropout rate of "
            f"{risk.dropout_rate:g} only {high} may be left",
            fix="have more silos, or assume a lower dropout or corruption rate",
        )
    return Design(silos - 1, min(max(low, silos // 2 + 1), high))


def check_design(silos: int, design: Design, risk: Risk) -> None:
    """Check degree and threshold that somebody else chose: that nobody can be read, not that the sum will come about.

    Raises:
        RunError: they are not safe under this risk.
    """
    _check(silos, risk)
    n, k, t = silos, design.degree, design.threshold
    complete = k == n - 1
    if not complete and (k % 2 or not 2 <= k < n - 1):
        raise RunError(f"no ring of {n} silos gives each {k} neighbours")
    if not complete and risk.malicious:
        raise RunError(
            "with a malicious coordinator, which may choose a graph's seed, only the complete graph is safe",
            fix="take the complete graph",
        )
    if not complete and not _stays_connected(n, k, risk):
        raise RunError(f"{k} neighbours each do not keep {n} silos connected", fix="raise the degree")
    low = _lowest(n, k, risk)
    if not low <= t <= k + 1:
        raise RunError(
            f"a threshold of {t} is not safe with {n} silos and {k} neighbours each",
            fix=f"take a threshold from {low} to {k + 1}" if low <= k + 1 else "raise the degree",
        )


def _check(silos: int, risk: Risk) -> None:
    if not 3 <= silos <= MOST:
        raise RunError(
            f"secure aggregation takes 3 to {MOST} silos, not {silos}",
            fix="with two silos the sum tells each of them the other's update",
        )
    for name, rate in (("dropout", risk.dropout_rate), ("corruption", risk.corruption_rate)):
        if not (math.isfinite(rate) and 0 <= rate < 1):
            raise RunError(f"the {name} rate is {rate:g}, not a share from 0 to below 1")
    if not (1 <= risk.security <= 256 and 1 <= risk.correctness <= 256):
        raise RunError("security and correctness are 1 to 256 bits")
    if silos - _count(risk.corruption_rate, silos) - _count(risk.dropout_rate, silos) < 2:
        raise RunError(
            f"of {silos} silos fewer than two honest ones may be left, and the sum would be one silo's update",
            fix="have more silos, or assume a lower dropout or corruption rate",
        )


def _count(rate: float, silos: int) -> int:
    """rate x silos, rounded up, with the rate taken as the decimal it was written as: 0.07 of 100 is 7."""
    return math.ceil(Fraction(str(rate)) * silos)


def _lowest(n: int, k: int, risk: Risk) -> int:
    """The smallest threshold under which nobody can be read (condition 1)."""
    corrupt = _count(risk.corruption_rate, n)
    if k < n - 1:
        corrupt = _most_marked(n - 1, corrupt, k, n << (risk.security + 1))
    low = max(2, corrupt + 1)
    if risk.malicious:
        # Honest holders told two lists: some give shares of the self mask, the others of the key, corrupt ones both.
        low = max(low, (k + 1 + corrupt) // 2 + 1, (k + 1) * 2 // 3 + 1)
    return low


def _highest(n: int, k: int, risk: Risk) -> int:
    """The largest threshold that k neighbours still reach after dropouts (condition 3)."""
    return k - _most_marked(n - 1, _count(risk.dropout_rate, n), k, n << risk.correctness)


def _most_marked(population: int, marked: int, drawn: int, odds: int) -> int:
    """The smallest m with P[X > m] <= 1/odds, where X of `drawn` without replacement are marked (hypergeometric).

    Exact: both sides are multiplied by the number of draws, which makes them integers.
    """
    draws, above = math.comb(population, drawn), 0
    for m in range(min(marked, drawn), 0, -1):
        above += math.comb(marked, m) * math.comb(population - marked, drawn - m)
        if above * odds > draws:
            return m
    return 0


def _stays_connected(n: int, k: int, risk: Risk) -> bool:
    """Condition 2. A ring falls apart only if two runs of k/2 silos in a row are all gone or corrupt; n (n - k - 1) / 2
    pairs of places, k silos each, a union bound (exact counts; the paper bounds the same event more loosely)."""
    gone = _count(risk.corruption_rate, n) + _count(risk.dropout_rate, n)
    return (n * (n - k - 1) << risk.security) * math.perm(gone, k) <= math.perm(n, k)


def ring_parts(graph: Neighbours, left: Sequence[str]) -> int:
    """Connected parts of the graph among those left."""
    unseen, parts = set(left), 0
    while unseen:
        parts += 1
        border = {unseen.pop()}
        while border:
            border = {other for silo in border for other in graph[silo]} & unseen
            unseen -= border
    return parts
