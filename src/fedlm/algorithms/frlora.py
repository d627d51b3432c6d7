"""FRLoRA: every round learns a residual of the weights, from their principal part anew."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.lora import factors_of, grown, layers_of
from fedlm.algorithms.lowrank import LowRank
from fedlm.algorithms.merged import merged
from fedlm.messages import Fields, Tensors
from fedlm.models.deltas import pieces_of


class FRLoRA(FedAvg):
    """In each round silos train W_t - s B_0 A_0 + s B A from B A = B_0 A_0, the principal singular part of the frozen
    weight W_0; A and B are averaged, and the change is added to the weight (Yan et al., ICLR 2025).

        W_t+1 = W_t + s (mean(B_i) mean(A_i) - B_0 A_0);   A, B <- A_0, B_0

    So the sum over the rounds can have any rank, and local training begins at the same well-conditioned factors every
    time. s B_0 A_0 = U_r S_r V_r' with S_r's root in each factor.

    The changes are kept beside the frozen weight as fp32 factors of rank 2 r for each round, written as
    s ((B - B_0) A + B_0 (A - A_0)), which loses no digits to the large common part. They travel to the silos: the way
    down, and the adapter at the end, grow with the rounds, until a dense matrix is smaller (see `merged`);
    `recompress` cuts them.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Residual(received, silo_state, place, self.adapter.scale(place.rank))

    def evaluated(self, parameters: Tensors, state: Tensors) -> Tensors:
        """W_t: without B_0, since s B_0 A_0 is in the frozen weight."""
        return {name: torch.zeros_like(v) if ".lora_B." in name else v for name, v in parameters.items()}

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in parameters.items() if ".lora_" in name}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        s, means = self.adapter.scale(self.adapter.rank) * self.server_lr, dict(accumulator.mean())
        changes = []
        for layer in layers_of(means):
            a, b = factors_of(layer)
            u_a, u_b = means[a], means[b]
            factors = LowRank(torch.cat([u_b, parameters[b]], dim=1) * s, torch.cat([parameters[a] + u_a, u_a]))
            changes.append((layer, factors))
        return merged(parameters, changes, str(step.round), self.spec.recompress), state

    def measure(
        self,
        before: tuple[Tensors, Tensors],
        accumulator: Accumulator,
        after: tuple[Tensors, Tensors],
        round_: int,
    ) -> Fields:
        """How far the deltas have grown. (The mean of the silos' changes is not known: updates are averaged.)"""
        return {"deltas": grown(pieces_of(after[0]))}


class Residual(LocalRule):
    """FRLoRA in the silo: what B_0 A_0 adds is taken out of the frozen weight."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, s: float) -> None:
        super().__init__(received, silo_state, place)
        self.s = s

    def start(self) -> Tensors:
        values = dict(self.received)
        for name, value in self.received.items():
            if ".lora_A." in name:
                values[name.replace(".lora_A.weight", ".delta_A.principal")] = value
            elif ".lora_B." in name:
                values[name.replace(".lora_B.weight", ".delta_B.principal")] = value * -self.s
        return values
