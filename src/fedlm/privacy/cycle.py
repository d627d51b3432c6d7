"""DP-FTRL over units that take part in a fixed cyclic order: its plan, and its noise.

All units are cut into batches once, and step t takes batch t modulo their number: a unit takes part every so many
steps, never closer, and no sampling need be secret. The noise of the steps is correlated by a banded strategy with at
most as many bands (`fedlm.privacy.matrix`), so that all steps of a run are *one* Gaussian mechanism, whose sensitivity
is exact (Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", NeurIPS 2023; Kairouz et al., "Practical and
Private (Deep) Learning without Sampling or Shuffling", ICML 2021). Steps that are left out only take contributions and
releases away. The same step with two different contributions is covered by nothing: whoever subtracts both has no noise
left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import PrivacyError
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.matrix import best_bands, sensitivity_of, solved, square_root
from fedlm.privacy.mechanisms import Gaussian, Unit
from fedlm.privacy.noise import gaussian
from fedlm.privacy.stream import SecretStream

MOST_BANDS = 32
"""Bands that are chosen at most where nobody says: as many rows of noise, of all trained numbers, are kept in memory
and drawn again when a round begins."""

BLOCK = 1 << 12
"""Numbers that are drawn at a time."""


@dataclass(frozen=True)
class Cycle:
    """All steps of a run over units in cyclic order. All of it is public.

    Args:
        units: rows, or users.
        batches: of a pass; a unit takes part in every so many steps.
        steps: of the whole run.
        bands: of the strategy.
        mechanism: the whole run as one release.
        deviation: of the fresh noise Z, over the bound of a contribution: the mechanism's noise multiplier times the
            strategy's sensitivity.
    """

    units: int
    batches: int
    steps: int
    bands: int
    mechanism: Gaussian
    deviation: float

    @property
    def expected(self) -> float:
        """Units in a step; batches differ by one at most."""
        return self.units / self.batches

    @property
    def coefficients(self) -> NDArray[np.float64]:
        """[bands] of the strategy, from the diagonal down."""
        return square_root(self.steps, self.bands)


@lru_cache(maxsize=64)
def plan(
    unit: Unit, units: int, batch: int, steps: int, epsilon: float, delta: float, bands: int | None = None
) -> Cycle:
    """The least noise with which all steps keep the budget.

    Args:
        batch: units in a step, at most.
        bands: None for those with the least error of prefix sums, up to `MOST_BANDS`.

    Raises:
        PrivacyError: no noise keeps the budget, or units take part more often than the bands allow.
    """
    if min(units, batch, steps) < 1:
        raise PrivacyError(f"{steps} steps of {batch} out of {units} units are no training")
    batches = math.ceil(units / min(batch, units))
    times = math.ceil(steps / batches)
    if bands is None:
        bands = best_bands(steps, times, batches, MOST_BANDS)
    if bands > batches:
        raise PrivacyError(
            f"each of {units} {unit}s takes part every {batches} steps, and noise that is correlated over {bands} "
            "steps covers none that comes back earlier",
            where="privacy.bands",
            fix=f"take at most {batches}, or a smaller `training.batch_size`",
        )
    whole = calibrate(Gaussian(unit, "zero-out", None), epsilon, delta, units)
    assert whole.noise_multiplier is not None
    coefficients = square_root(steps, bands)
    deviation = whole.noise_multiplier * sensitivity_of(coefficients, steps, times, batches)
    return Cycle(units, batches, steps, bands, whole, deviation)


class CorrelatedNoise:
    """Rows of C^-1 Z by parameter, from a step on; Z follows from a secret, a place, the parameter and the step.

    Whoever asks from step 40 on gets what somebody who began at 0 gets there: the rows before are drawn again. A number
    of a parameter has its own Z, so it does not matter which others are trained in a round.

    Args:
        cycle: whose strategy it is.
        secret: of the silo.
        place: names the run and the silo; with another cycle it must be another one.
        first: the step that is asked for first.

    Raises:
        PrivacyError: the run has no such step.
    """

    def __init__(self, cycle: Cycle, secret: bytes, place: tuple[str | int, ...], first: int) -> None:
        if not 0 <= first < cycle.steps:
            raise PrivacyError(
                f"step {first} is beyond the {cycle.steps} steps that this run's noise was sized for",
                fix="begin another run",
            )
        self._cycle, self._secret, self._place, self._first = cycle, secret, place, first
        self._rows: dict[str, Iterator[NDArray[np.float64]]] = {}

    def __call__(self, name: str, count: int) -> NDArray[np.float64]:
        """[count] the noise of the parameter's next step, for fresh noise of deviation 1.

        Raises:
            PrivacyError: the steps are used up, or the parameter had another size a step ago.
        """
        if name not in self._rows:
            self._rows[name] = solved(self._cycle.coefficients, self._fresh(name, count))
            for _ in range(self._first):
                next(self._rows[name])
        row = next(self._rows[name], None)
        if row is None:
            raise PrivacyError(f"the run's {self._cycle.steps} steps are used up", fix="begin another run")
        if len(row) != count:
            raise PrivacyError(f"'{name}' had {len(row)} numbers, and now has {count}")
        return row

    def _fresh(self, name: str, count: int) -> Iterator[NDArray[np.float64]]:
        for step in range(self._cycle.steps):
            place = (*self._place, name, step)
            # By blocks that are drawn whole: a number's Z must not depend on how many there are in a round.
            blocks = [
                gaussian(SecretStream(self._secret, "correlated", *place, block), 1.0, BLOCK)
                for block in range(-(-count // BLOCK))
            ]
            yield np.concatenate(blocks)[:count]
