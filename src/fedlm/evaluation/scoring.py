"""Likelihoods of groups of sequences: what one row needs lies together, so its shared beginning is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.training.forward import sequence_nll
from fedlm.training.sequences import Encoded


def grouped_nll(
    model: Any, groups: Sequence[Sequence[Encoded]], *, batch_tokens: int, packing: bool = True
) -> list[tuple[NDArray[np.float64], NDArray[np.int64]]]:
    """Per group, its sequences' summed NLL of the target tokens (nats) and the number of targets."""
    nll, counts = sequence_nll(model, [s for group in groups for s in group], batch_tokens, packing=packing)
    ends = np.cumsum([len(group) for group in groups])
    return [(nll[end - len(g) : end], counts[end - len(g) : end]) for g, end in zip(groups, ends, strict=True)]
