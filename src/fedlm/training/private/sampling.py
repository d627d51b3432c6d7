"""Which examples take part in a private step: each by itself with the same probability, whatever the others do.

Amplification by sampling is proved for exactly this draw (Abadi et al., CCS 2016, section 3; Mironov, Talwar and Zhang,
2019). Shuffled batches of a fixed size are another mechanism, which costs more privacy than such a proof says.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import TrainingError

Indices = NDArray[np.int64]


def poisson_batches(examples: int, rate: float, steps: int, generator: np.random.Generator) -> Iterator[Indices]:
    """Numbers, in rising order, of the examples of each of `steps` steps. A batch may be empty: its step is noise.

    Whoever knows the draws knows who took part, so `generator` must be the silo's secret.

    Args:
        examples: how many there are.
        rate: the probability q with which each takes part in a step.
        steps: fixed beforehand; what is drawn never changes their number.

    Raises:
        TrainingError: the rate is no probability above 0, or there are no steps or examples.
    """
    if not 0.0 < rate <= 1.0:
        raise TrainingError(f"the sampling rate is {rate}, and must be above 0 and at most 1")
    if steps < 1 or examples < 1:
        raise TrainingError(f"private training needs steps and examples, and has {steps} and {examples}")
    return (np.flatnonzero(generator.random(examples) < rate).astype(np.int64) for _ in range(steps))
