"""Watching runs of silos that differ: what each training began with and sent, and what a run left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlm.algorithms.base import Algorithm, Place
from fedlm.files import read_tensors
from fedlm.messages import Tensors
from fedlm.training import loop

SITES = [f"site{n}" for n in range(4)]
SHORT = ("federation.rounds=3", "training.steps=2", "adapter.rank=4", "data.split.test=0")


class Seen:
    """What every training of a run began with and on what, and every update that was folded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: dict[tuple[str, int], dict[str, torch.Size]] = {}
        """By silo and round: the trained parameters' shapes."""
        self.loaded: dict[tuple[str, int], dict[str, Tensor]] = {}
        """By silo and round: every parameter of the adapter as training began."""
        self.dtypes: dict[str, torch.dtype] = {}
        self.specs: dict[str, Any] = {}
        self.updates: dict[tuple[str, int], tuple[Tensors, float]] = {}
        train, fold = loop.train, Algorithm.fold

        def watched(model: Any, parameters: Any, data: Any, spec: Any, window: Any, **rest: Any) -> Any:
            from fedlm.models.adapters import adapter_parameters

            key = (rest["silo"], window.round)
            self.trained[key] = {name: p.shape for name, p in parameters.items()}
            self.loaded[key] = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
            self.dtypes[rest["silo"]] = model.get_input_embeddings().weight.dtype
            self.specs[rest["silo"]] = spec
            return train(model, parameters, data, spec, window, **rest)

        def folded(of: Algorithm, sums: Any, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
            self.updates[place.silo, place.round] = ({n: t.clone() for n, t in update.items()}, weight)
            fold(of, sums, update, weight, place)

        monkeypatch.setattr(loop, "train", watched)
        monkeypatch.setattr(Algorithm, "fold", folded)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()][1:]


def adapter(folder: Path) -> Tensors:
    return read_tensors(folder / "adapter" / "adapter_model.safetensors")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def model_after(folder: Path, round_: int) -> Tensors:
    return read_tensors(folder / "checkpoints" / f"round-{round_:04d}" / "model.safetensors")
