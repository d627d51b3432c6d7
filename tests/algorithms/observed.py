"""Whole federations in this process, of real silos on a real (tiny) model, with what every silo's model really was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedlm.data.federated import load_data
from fedlm.federation.api import about, new_run
from fedlm.federation.coordinator import run
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Failure, Reply, Request, Tensors
from fedlm.models.adapters import lora_layers
from fedlm.models.deltas import Delta
from fedlm.recipe.schema import Recipe

Weights = dict[str, Tensor]
"""By LoRA layer, what is added to the frozen weight, in fp64."""


@torch.no_grad()
def effective(model: torch.nn.Module) -> Weights:
    """s B A and the deltas, as they stand in the model."""
    found: Weights = {}
    for name, layer in lora_layers(model).items():
        (adapter,) = layer.lora_A
        change = layer.lora_B[adapter].weight.double() @ layer.lora_A[adapter].weight.double()
        found[name] = layer.scaling[adapter] * change
        for hook in layer._forward_hooks.values():
            if isinstance(hook, Delta):
                found[name] = found[name] + hook.dense().double()
    return found


def distance(one: Weights, other: Weights) -> float:
    """|one - other|_F / |other|_F over all layers."""
    squares = [((one[name] - other[name]).square().sum(), other[name].square().sum()) for name in other]
    return float((sum(s[0] for s in squares) / sum(s[1] for s in squares)) ** 0.5)


class Observed:
    """An engine of silos in this process.

    Attributes:
        trained: by round and silo, the silo's model after its training.
        loaded: by round and silo, the model that was measured after that round (-1: before the first).
        tensors: by round, the last that was sent for measuring.
        broadcasts: by round, the last that was sent for training.
        updates: by round and silo, what left it.
        weights: by round and silo, its rows.
    """

    def __init__(self, recipe: Recipe, base: Path, state: Path) -> None:
        self.data = load_data(recipe, base)
        self.bench = Workbench(recipe, self.data)
        self._silos = {name: Silo(name, self.bench, state) for name in self.data.names}
        self.trained: dict[int, dict[str, Weights]] = {}
        self.loaded: dict[int, dict[str, Weights]] = {}
        self.tensors: dict[int, Tensors] = {}
        self.broadcasts: dict[int, Tensors] = {}
        self.updates: dict[int, dict[str, Tensors]] = {}
        self.weights: dict[int, dict[str, float]] = {}
        self.stop_before: int | None = None

    def silos(self) -> Sequence[str]:
        return sorted(self._silos)

    def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:  # noqa: ARG002
        for request in requests:
            if request.verb == "train" and request.round == self.stop_before:
                raise KeyboardInterrupt
            answer = self._silos[request.silo].handle(request)
            assert isinstance(answer, Reply), answer
            if request.verb == "train":
                self.broadcasts[request.round] = request.tensors
                self.trained.setdefault(request.round, {})[request.silo] = effective(self.bench.model)
                self.updates.setdefault(request.round, {})[request.silo] = answer.tensors
                self.weights.setdefault(request.round, {})[request.silo] = float(answer.fields.get("rows", 1))
            if request.verb == "evaluate":
                self.loaded.setdefault(request.round, {})[request.silo] = effective(self.bench.model)
                self.tensors[request.round] = request.tensors
            fields = {**answer.fields, "received_bytes": 0, "sent_bytes": 0}
            yield Reply(answer.silo, answer.verb, answer.run, answer.round, answer.attempt, answer.tensors, fields)

    def close(self) -> None:
        return

    def mean(self, round_: int) -> Weights:
        """What the silos learnt in a round, weighted by their rows."""
        weights = self.weights[round_]
        models = self.trained[round_]
        total = sum(weights.values())
        layers = next(iter(models.values()))
        return {layer: sum(weights[s] / total * models[s][layer] for s in models) for layer in layers}  # type: ignore[misc]

    def error(self, round_: int) -> float:
        """How far the model that silos load after a round is from the mean of the models they trained."""
        (loaded, *others) = self.loaded[round_].values()
        assert all(distance(other, loaded) == 0 for other in others), "all silos load the same"
        return distance(loaded, self.mean(round_))


def federate(recipe: Recipe, base: Path, folder: Path, *, interrupt: int | None = None) -> tuple[Observed, RunDir]:
    """Run a recipe in this process; with `interrupt` it stops before that round's training and is resumed."""
    engine = Observed(recipe, base, folder / "silos")
    directory = new_run(recipe, folder, base=base, **about(engine.data))
    try:
        if interrupt is not None:
            engine.stop_before = interrupt
            assert run(recipe, engine, directory).status == "interrupted"
            engine.stop_before = None
        run(recipe, engine, directory, resume=interrupt is not None)
    finally:
        directory.close()
    return engine, RunDir.open(folder, write=False)


def final(directory: RunDir, round_: int | None = None) -> Tensors:
    """The last checkpoint's model, or a round's."""
    checkpoint: Any = directory.load_checkpoint(round_)
    return dict(checkpoint.parameters)
