"""Noise that is correlated across steps (DP-FTRL): its sensitivity, and the noise itself.

Where nobody can be sampled secretly, noise of one step may take back part of the step before, so that sums over many
steps carry less of it. With a strategy matrix C (steps by steps, lower triangular) the noise of all steps is C^-1 Z, Z
being independent; releasing all of it is *one* Gaussian mechanism on C times the contributions (Denisov, McMahan, Rush,
Smith, Guha Thakurta, NeurIPS 2022; also where contributions depend on earlier releases). Its noise
multiplier is Z's over the sensitivity of C, which depends on how often and how close together a unit takes part
(Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", NeurIPS 2023).

Only what can be computed exactly is taken: one participation (any C, for instance the binary tree), or several that are
at least as far apart as C has bands. No amplification by sampling is counted.

The banded square root has the same few coefficients in every row, so that for thousands of steps no matrix is needed:
`square_root`, `sensitivity_of`, `prefix_error` and `solved` work from these alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy.mechanisms import Adjacency, Gaussian, Unit

Matrix = NDArray[np.float64]


def banded_square_root(steps: int, bands: int) -> Matrix:
    """[steps, steps] lower triangular Toeplitz: the first `bands` diagonals of the square root of the summing matrix.

    Coefficients of (1 - x)^(-1/2): 1, 1/2, 3/8 ... (Fichtenberger, Henzinger, Upadhyay, "Constant Matters", ICML 2023).
    With one band it is the identity: independent noise, as in DP-SGD.

    Raises:
        PrivacyError: no steps, or bands beyond 1 to steps.
    """
    strategy = np.zeros((steps, steps))
    for k, coefficient in enumerate(square_root(steps, bands)):
        strategy[np.arange(k, steps), np.arange(steps - k)] = coefficient
    return strategy


def square_root(steps: int, bands: int) -> NDArray[np.float64]:
    """[bands] the coefficients of `banded_square_root`, from the diagonal down.

    Raises:
        PrivacyError: as there.
    """
    if not 1 <= bands <= steps:
        raise PrivacyError(f"{bands} bands of {steps} steps; there must be 1 up to as many as steps")
    return np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))]).astype(np.float64)


def binary_tree(steps: int) -> Matrix:
    """[nodes, steps] of zeros and ones: the nodes of the binary tree over the steps, a row each (Dwork et al.; Chan,
    Shi, Song, 2010-11). Not square: for `sensitivity` alone, with one participation."""
    height = (steps - 1).bit_length() + 1
    rows = [
        [1.0 if start <= step < start + width else 0.0 for step in range(steps)]
        for width in (1 << level for level in range(height))
        for start in range(0, steps, width)
    ]
    return np.array(rows)


def sensitivity(strategy: Matrix, participations: int, separation: int) -> float:
    """Largest L2 norm of C times what a unit contributes, each contribution having a norm of at most 1.

    Args:
        strategy: C, [rows, steps].
        participations: steps that a unit takes part in at most.
        separation: least difference between any two of them (1: they may follow each other).

    Raises:
        PrivacyError: a unit takes part several times closer together than C has bands: its contributions overlap, and
            their exact sensitivity would need a search over all patterns.
    """
    steps = strategy.shape[1]
    if not 1 <= participations <= steps or separation < 1 or not np.isfinite(strategy).all():
        raise PrivacyError(f"{participations} participations of {steps} steps, {separation} apart, are no pattern")
    squares: NDArray[np.float64] = (strategy**2).sum(axis=0)
    if participations == 1:
        return float(np.sqrt(squares.max()))
    _check_apart(separation, _bands(strategy))
    return _most(squares, participations, separation)


def sensitivity_of(coefficients: NDArray[np.float64], steps: int, participations: int, separation: int) -> float:
    """`sensitivity` of the lower triangular strategy [steps, steps] that has these coefficients in every row.

    Args:
        coefficients: [bands], from the diagonal down.

    Raises:
        PrivacyError: as `sensitivity`.
    """
    bands = len(coefficients)
    if not 1 <= participations <= steps or separation < 1 or not 1 <= bands <= steps:
        raise PrivacyError(f"{participations} participations of {steps} steps, {separation} apart, are no pattern")
    whole = np.cumsum(coefficients**2)
    squares = whole[np.minimum(bands, steps - np.arange(steps)) - 1]  # the last columns are cut off
    if participations > 1:
        _check_apart(separation, bands)
    return _most(squares, participations, separation)


def prefix_error(coefficients: NDArray[np.float64], steps: int) -> float:
    """Root mean square, over the steps, of the deviation of sums of the noise up to a step, for fresh noise of
    deviation 1: what correlation is meant to make small. Without it (one coefficient) it is the root of (steps + 1)/2.
    """
    impulse = np.zeros((steps, 1))
    impulse[0] = 1.0
    sums = np.cumsum(np.concatenate([*solved(coefficients, iter(impulse))]))
    return float(np.sqrt(np.sum((steps - np.arange(steps)) * sums**2) / steps))


def best_bands(steps: int, participations: int, separation: int, most: int) -> int:
    """Of 1, 2, 4 ... and `separation`, at most `most`, the bands with the least `prefix_error` at equal privacy."""
    limit = min(separation, steps, most)
    tried = sorted({1 << k for k in range(limit.bit_length()) if 1 << k <= limit} | {limit})

    def error(bands: int) -> float:
        coefficients = square_root(steps, bands)
        return sensitivity_of(coefficients, steps, participations, separation) * prefix_error(coefficients, steps)

    return min(tried, key=error)


def as_gaussian(
    strategy: Matrix, noise: float, participations: int, separation: int, unit: Unit, adjacency: Adjacency
) -> Gaussian:
    """The whole training as one Gaussian mechanism.

    Args:
        noise: standard deviation of Z over the bound of a contribution.
    """
    return Gaussian(unit, adjacency, noise / sensitivity(strategy, participations, separation))


def correlated(strategy: Matrix, fresh: Iterator[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
    """The rows of C^-1 Z, one after the other, from the rows of Z; keeps as many as C has bands, less one.

    Args:
        strategy: square, lower triangular, its diagonal not 0.
        fresh: rows of Z, of any one shape.
    """
    bands = _bands(strategy)
    if not np.diag(strategy).all():
        raise PrivacyError("the strategy has a 0 on its diagonal: its noise cannot be drawn step by step")
    kept: list[NDArray[np.float64]] = []
    for step in range(strategy.shape[0]):
        row = next(fresh).astype(np.float64)
        for back, earlier in enumerate(reversed(kept), start=1):
            row -= strategy[step, step - back] * earlier
        row /= strategy[step, step]
        kept = [*kept, row][-(bands - 1) :] if bands > 1 else []
        yield row


def solved(coefficients: NDArray[np.float64], fresh: Iterator[NDArray[np.float64]]) -> Iterator[NDArray[np.float64]]:
    """`correlated` for the strategy that has these coefficients in every row; ends where `fresh` does.

    Args:
        coefficients: [bands], from the diagonal down; the first is not 0.
        fresh: rows of Z, of any one shape.
    """
    kept: deque[NDArray[np.float64]] = deque(maxlen=len(coefficients) - 1)
    for drawn in fresh:
        row = drawn.astype(np.float64)
        for coefficient, earlier in zip(coefficients[1:], kept, strict=False):
            row -= coefficient * earlier
        row /= coefficients[0]
        kept.appendleft(row)
        yield row


def _check_apart(separation: int, bands: int) -> None:
    if separation < bands:
        raise PrivacyError(
            f"a unit takes part every {separation} steps, and the strategy has {bands} bands: their noise overlaps",
            fix=f"take at most {separation} bands, or let a unit rest for {bands} steps",
        )


def _most(squares: NDArray[np.float64], participations: int, separation: int) -> float:
    """The root of the largest sum of so many squares that are so far apart: columns of which no two share a row."""
    steps = len(squares)
    best = np.zeros(steps + separation)  # among columns i, i+1, ..., by dynamic programming
    for _ in range(participations):
        best[:steps] = np.maximum.accumulate((squares + best[separation:])[::-1])[::-1]
    return float(np.sqrt(best[0]))


def _bands(strategy: Matrix) -> int:
    """Diagonals from the main one down to the last with an entry.

    Raises:
        PrivacyError: not square and lower triangular.
    """
    if strategy.shape[0] != strategy.shape[1] or np.triu(strategy, 1).any():
        raise PrivacyError("the strategy is not a square lower triangular matrix")
    rows, columns = np.nonzero(strategy)
    return int((rows - columns).max()) + 1
