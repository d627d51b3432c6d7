"""LoRA-FAIR: A and B are averaged, and the server corrects B so that the product comes near the mean change."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedit import FedIT
from fedlm.algorithms.lora import Trained
from fedlm.algorithms.lowrank import side_by_side
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors


class LoRAFAIR(FedIT):
    """A <- A_m, B <- B_m + dB with the means A_m, B_m and a correction dB that brings (B_m + dB) A_m near
    W = sum p_i B_i A_i and stays small (Bian et al., ICCV 2025).

    The paper minimises S(W, (B_m + dB) A_m) + lambda |dB|, with the cosine for S, by SGD at the server. Here S is the
    squared distance and the penalty is squared too, which has a closed form (ridge regression):

        dB = (W - B_m A_m) A_m' (A_m A_m' + lambda I)^-1

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
            a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
            # (W - B_m A_m) A_m' is a covariance, sum p_i (B_i - B_m) A_i A_m': small terms, so fp32 is enough.
            rest = torch.zeros_like(stepped[b])
            for silos, b_n, a_n in trained.silos(layer):
                p = trained.shares(layer, silos).float()[:, None, None]
                rest.addmm_(*side_by_side(b_n - stepped[b], p * (a_n @ stepped[a].t())))
            stepped[b] = stepped[b] + correction(stepped[a], rest, self.spec.fair_lambda)
        return stepped, state


def correction(a: Tensor, rest: Tensor, strength: float) -> Tensor:
    """dB [d_out, r], given (W - B_m A_m) A_m' (`rest`, [d_out, r])."""
    mean = a.double()
    ridge = strength * torch.eye(len(a), dtype=mean.dtype)
    solved: Tensor = torch.linalg.solve(mean @ mean.t() + ridge, rest.double(), left=False)
    return solved.float()
