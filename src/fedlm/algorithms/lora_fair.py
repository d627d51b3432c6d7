"""LoRA-FAIR: A and B are averaged, and the server corrects B so that the product comes near the mean change."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedit import FedIT
from fedlm.algorithms.lora import Trained
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors


class LoRAFAIR(FedIT):
    """A <- A_m, B <- B_m + dB with the means A_m, B_m and a correction dB that brings (B_m + dB) A_m near
    W = sum p_i B_i A_i and stays small (Bian et al., ICCV 2025).

    The paper minimises S(W, (B_m + dB) A_m) + lambda |dB|, with the cosine for S, by SGD at the server. Here S is the
    squared distance and the penalty is squared too, which has a closed form (ridge regression):

        dB = (W - B_m A_m) A_m' (A_m A_m' + lambda I)^-1
        B_m + dB = (sum p_i B_i (A_i A_m') + lambda B_m) (A_m A_m' + lambda I)^-1

    It needs no learning rate, no number of steps and no dense matrix, gets the length of W right beside its direction,
    and never has a larger error than B_m. lambda (`fair_lambda`) is on the scale of A A', whose eigenvalues begin at
    about 1/3; towards 0 the error becomes the least that A_m allows.
    """

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Stored)
        trained = Trained(self, (parameters, state), accumulator, step.round)
        stepped, state = super().server_step(parameters, accumulator, state, step)
        for layer in trained.layers:
            b, mean = f"{layer}.lora_B.weight", stepped[f"{layer}.lora_A.weight"].double()
            seen = torch.zeros(stepped[b].shape, dtype=torch.float64)  # sum p_i B_i A_i A_m'
            weight = accumulator.weight_of((f"{layer}.lora_A.weight", b))
            for kept, b_i, a_i in trained.silos(layer):
                seen.addmm_(b_i.double(), a_i.double() @ mean.t(), alpha=kept.weight / weight)
            stepped[b] = corrected(stepped[b].double(), mean, seen, self.spec.fair_lambda).float()
        return stepped, state


def corrected(b: Tensor, a: Tensor, seen: Tensor, strength: float) -> Tensor:
    """B_m + dB [d_out, r], given W A_m' (`seen`, [d_out, r])."""
    ridge = strength * torch.eye(len(a), dtype=a.dtype)
    corrected: Tensor = torch.linalg.solve(a @ a.t() + ridge, seen + strength * b, left=False)
    return corrected
