"""The learning rate over the whole run's progress, so that rounds continue one schedule instead of restarting it."""

from __future__ import annotations

import math

from fedlm.recipe.schema import TrainingSpec


def learning_rate(spec: TrainingSpec, progress: float) -> float:
    """The rate at `progress` in [0, 1]: linear warm-up, then constant, linear or cosine down to `final_lr` * lr."""
    if spec.warmup > 0 and progress < spec.warmup:
        return spec.lr * progress / spec.warmup
    rest = (progress - spec.warmup) / (1 - spec.warmup) if spec.warmup < 1 else 0.0
    rest = min(max(rest, 0.0), 1.0)
    match spec.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - rest
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * rest))
    return spec.lr * (spec.final_lr + (1.0 - spec.final_lr) * share)
