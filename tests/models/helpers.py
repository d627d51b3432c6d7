"""Recipes and trained-looking tensors for the model tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedlm.messages import Tensors
from fedlm.models.adapters import initial_tensors
from fedlm.recipe.schema import ModelSpec, Recipe

OWN = {"lora-sb": "fed-sb", "prompt-projection": "fedbpt"}
"""Algorithms that kinds of adapter have for themselves."""


def spec(source: Path | str, **more: Any) -> ModelSpec:
    return ModelSpec.model_validate({"source": str(source), "dtype": "float32", "device": "cpu"} | more)


def recipe(source: Path | str, adapter: dict[str, Any] | None = None, seed: int = 0, **model: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": seed,
            "model": spec(source, **model).model_dump(),
            "adapter": adapter or {},
            "data": {"silos": [{"name": "a", "sources": [{"path": "rows.jsonl", "columns": {"text": "text"}}]}]},
            "training": {"steps": 1},
            "task": "pretrain",
            "federation": {"algorithm": {"name": OWN.get((adapter or {}).get("kind", ""), "fedavg")}},
        }
    )


def trained(of: Recipe, scale: float = 0.02) -> Tensors:
    """The first tensors moved a little, so that an adapter changes the logits."""
    generator = torch.Generator().manual_seed(1)
    return {n: t + scale * torch.randn(t.shape, generator=generator) for n, t in initial_tensors(of).items()}
