"""LoRA-XS: fixed A and B from the frozen weight's own SVD; a small square matrix between them is all that travels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, LocalRule, Place, Step
from fedlm.algorithms.lowrank import LowRank, squared_norm
from fedlm.algorithms.stored import Stored
from fedlm.messages import Fields, Tensors

SQUARES = "lora_R.weight"
"""The update: all layers' R_i - R, in sorted order of the layers, in one tensor [layers, r, r]."""


class LoRAXS(Algorithm):
    """dW = U_r S_r R V_r' with the frozen weight's U_r S_r V_r'; silos train R [r, r] (Balazy et al., 2024), the server
    averages it.

    mean(B R_i A) = B mean(R_i) A, so aggregation is exact, and an update has r^2 numbers a layer whatever its size. A =
    V_r' and s B = U_r S_r come from no data, so nothing about rows leaves before R does: unlike Fed-SB it can be masked
    and trained by noised gradients. They travel down once. R starts at 0 (the paper: at normal values of 1e-5).
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        """From the principal part, which has a root of S in each factor."""
        values = first()
        for name in [name for name in values if ".lora_A." in name]:
            a, b = values[name], name.replace(".lora_A.", ".lora_B.")
            roots = a.norm(dim=1, keepdim=True)
            values[name], values[b] = a / roots.clamp(min=torch.finfo(a.dtype).tiny), values[b] * roots.t()
            values[name.replace(".lora_A.", ".lora_R.")] = torch.zeros(len(a), len(a))
        return values

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return SquareOnly(received, silo_state, place)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        r = self.adapter.rank
        return {SQUARES: torch.Size((len(layers_of(parameters)), r, r))}

    def accumulator(self, spool: Path) -> Accumulator:
        return Stored(spool, summed=True)

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Stored)
        accumulator.keep(update, weight, place)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        mean, stepped = dict(accumulator.mean())[SQUARES], dict(parameters)
        for i, layer in enumerate(layers_of(parameters)):
            r = f"{layer}.lora_R.weight"
            stepped[r] = torch.add(parameters[r], mean[i], alpha=self.server_lr)
        return stepped, state

    def measure(
        self, before: tuple[Tensors, Tensors], accumulator: Accumulator, after: tuple[Tensors, Tensors], round_: int
    ) -> Fields:
        """`aggregation_error`: |s B (R - mean(R_i)) A|_F / |s B mean(R_i) A|_F over all layers."""
        assert isinstance(accumulator, Stored)
        (old, _), (new, _), layers = before, after, layers_of(before[0])
        mean = torch.stack([old[f"{layer}.lora_R.weight"] for layer in layers]).double()
        for kept, update in accumulator.read([SQUARES]):
            mean.add_(update[SQUARES], alpha=kept.weight / accumulator.weight)
        missed = whole = 0.0
        for layer, square in zip(layers, mean, strict=True):
            a, b, r = (new[f"{layer}.lora_{part}.weight"].double() for part in "ABR")
            missed += squared_norm(LowRank(b @ (r - square), a))
            whole += squared_norm(LowRank(b @ square, a))
        return {"aggregation_error": math.sqrt(missed / whole) if whole else None}


class SquareOnly(LocalRule):
    """In the silo R alone is trained."""

    def trains(self, name: str) -> bool:
        return ".lora_R." in name

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        names = [f"{layer}.lora_R.weight" for layer in layers_of(trained)]
        return {SQUARES: torch.stack([trained[name] - self.received[name] for name in names])}, {}


def layers_of(tensors: Tensors) -> list[str]:
    """The layers' names, sorted."""
    return sorted(name.removesuffix(".lora_R.weight") for name in tensors if name.endswith(".lora_R.weight"))
