"""Helpers shared by the training tests."""

from __future__ import annotations

import numpy as np
from torch.nn import Module, Parameter

from fedlm.training.sequences import Encoded


def learnt(model: Module) -> dict[str, Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def sequence(*parts: tuple[int, int], answer: int = 4) -> Encoded:
    """Random tokens; each part is (seed, length), so equal parts give equal tokens. The last `answer` are targets."""
    ids = np.concatenate([np.random.default_rng(seed).integers(3, 512, n) for seed, n in parts]).astype(np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(ids) - answer)
