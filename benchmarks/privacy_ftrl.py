"""Which noise disturbs training less at the same promise, DP-SGD's or DP-FTRL's: the table of
docs/differential-privacy.md.

python benchmarks/privacy_ftrl.py
"""

from __future__ import annotations

import math

from fedlm.privacy.calibration import calibrate
from fedlm.privacy.cycle import Cycle, plan
from fedlm.privacy.matrix import prefix_error
from fedlm.privacy.mechanisms import Gaussian, Poisson

DELTA = 1e-5

SETTINGS = ((1000, 50, 20), (1000, 50, 100), (1000, 200, 50), (10_000, 100, 200))
"""Rows, rows in a step, and steps of the whole run."""

EPSILONS = (1.0, 2.0, 4.0, 8.0)


def dp_sgd(rows: int, batch: int, steps: int, epsilon: float) -> float:
    """Root mean square over the steps of the noise in sums of mean gradients up to a step, in units of the clip."""
    asked = Gaussian("example", "zero-out", None, Poisson(batch / rows, secret=True), steps)
    noise = calibrate(asked, epsilon, DELTA, rows).noise_multiplier
    assert noise is not None
    return noise * math.sqrt((steps + 1) / 2) / batch


def dp_ftrl(rows: int, batch: int, steps: int, epsilon: float, bands: int | None = None) -> tuple[float, Cycle]:
    """The same, and the plan."""
    cycle = plan("example", rows, batch, steps, epsilon, DELTA, bands)
    return cycle.deviation * prefix_error(cycle.coefficients, steps) / cycle.expected, cycle


def main() -> None:
    print("| rows, in a step, steps | passes | epsilon | DP-SGD | DP-FTRL, independent | DP-FTRL | bands |")
    print("|---|---|---|---|---|---|---|")
    for rows, batch, steps in SETTINGS:
        for epsilon in EPSILONS:
            sampled = dp_sgd(rows, batch, steps, epsilon)
            alone, _ = dp_ftrl(rows, batch, steps, epsilon, bands=1)
            found, cycle = dp_ftrl(rows, batch, steps, epsilon)
            best = [
                f"**{value:.3f}**" if value <= min(sampled, found) else f"{value:.3f}" for value in (sampled, found)
            ]
            print(
                f"| {rows}, {batch}, {steps} | {steps * batch / rows:g} | {epsilon:g} | {best[0]} | {alone:.3f} | "
                f"{best[1]} | {cycle.bands} |"
            )


if __name__ == "__main__":
    main()
