"""Shamir's secret sharing (Communications of the ACM, 1979) over a prime field.

A secret is the constant term of a random polynomial of degree t - 1, a share its value at a holder's x. Any t shares
give it back by Lagrange interpolation at 0; fewer fit every secret equally often.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations

from fedlm.errors import AggregationRefused

PRIME = 2**256 + 297
"""The smallest prime above 2^256: any 32 bytes are a field element."""

WIDTH = 33
"""Bytes of an element of this field."""

Share = tuple[int, int]
"""x and the polynomial's value there."""

SUSPECTS = 2
"""Wrong shares of one secret that are looked for."""


def share(secret: int, threshold: int, places: Sequence[int], prime: int = PRIME) -> list[Share]:
    """Shares of a secret at these places, any `threshold` of which give it back.

    Raises:
        AggregationRefused: the secret or a place is not in the field, a place is 0 or there twice, or fewer places
            than the threshold.
    """
    _check_places(places, threshold, prime)
    if not 0 <= secret < prime:
        raise AggregationRefused("the secret is not an element of the field")
    coefficients = [secret, *(secrets.randbelow(prime) for _ in range(threshold - 1))]
    return [(x, evaluate(coefficients, x, prime)) for x in places]


def evaluate(coefficients: Sequence[int], x: int, prime: int = PRIME) -> int:
    """A polynomial's value, lowest coefficient first."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % prime
    return value


def recover(shares: Sequence[Share], threshold: int, prime: int = PRIME) -> int:
    """The secret, from the first `threshold` shares.

    Raises:
        AggregationRefused: too few, a place twice or 0, a share outside the field.
    """
    return interpolate(shares, threshold, 0, prime)


def interpolate(shares: Sequence[Share], threshold: int, at: int, prime: int = PRIME) -> int:
    """The polynomial's value at `at`, from the first `threshold` shares. Raises as `recover` does."""
    _check_places([x for x, _ in shares], threshold, prime)
    if any(not 0 <= y < prime for _, y in shares):
        raise AggregationRefused("a share is not an element of the field")
    used = shares[:threshold]
    weights, product, total = _weights(tuple(x for x, _ in used), prime), 1, 0
    for weight, (x, y) in zip(weights, used, strict=True):
        if x == at:
            return y
        product = product * (at - x) % prime
        total += weight * _inverse(at - x, prime) % prime * y
    return product * total % prime


def recover_checked(
    shares: Sequence[Share], threshold: int, right: Callable[[int], bool], prime: int = PRIME
) -> tuple[int, list[int]] | None:
    """The secret that `right` says yes to, and the places of wrong shares; None if no secret is found.

    Up to two wrong shares are looked for, by leaving out each one and each pair. Whoever gives several wrong ones can
    choose them so that some polynomial through them and right ones has the right secret, and others seem to lie. So e
    places are named only if 2 e <= shares + 1 - threshold: two polynomials that each fit all but e shares would meet in
    `threshold` points, the secret among them. Those named are the liars if no more than e lied.

    Raises:
        AggregationRefused: as `recover`.
    """
    _check_places([x for x, _ in shares], threshold, prime)
    found = None
    for left_out in range(min(SUSPECTS, len(shares) - threshold) + 1):
        for suspects in combinations(range(len(shares)), left_out):
            kept = [share for place, share in enumerate(shares) if place not in suspects]
            secret = recover(kept, threshold, prime)
            if right(secret):
                wrong = [x for x, y in shares if interpolate(kept, threshold, x, prime) != y]
                if 2 * len(wrong) <= len(shares) + 1 - threshold:
                    return secret, wrong
                found = secret, list[int]()
    return found


@lru_cache(maxsize=4096)
def _weights(places: tuple[int, ...], prime: int) -> tuple[int, ...]:
    """Barycentric (Berrut and Trefethen, SIAM Review 2004): 1 over the product of a place's distances to all others."""
    weights = []
    for x in places:
        distances = 1
        for other in places:
            if other != x:
                distances = distances * (x - other) % prime
        weights.append(pow(distances, -1, prime))
    return tuple(weights)


@lru_cache(maxsize=65536)
def _inverse(distance: int, prime: int) -> int:
    return pow(distance, -1, prime)


def _check_places(places: Sequence[int], threshold: int, prime: int) -> None:
    if threshold < 1:
        raise AggregationRefused(f"a threshold of {threshold} protects nothing")
    if len(places) < threshold:
        raise AggregationRefused(f"{len(places)} shares do not reach the threshold of {threshold}")
    if any(not 0 < x < prime for x in places):
        raise AggregationRefused("a share's place is 0 or not in the field")
    if len(set(places)) != len(places):
        raise AggregationRefused("there are two shares of one place")
