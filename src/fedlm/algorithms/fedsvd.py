"""FedSVD: B is trained and averaged; then an SVD of B A gives a new, orthonormal A."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.fedit import FedIT
from fedlm.algorithms.rolora import OneFactor
from fedlm.messages import Tensors


class FedSVD(FedIT):
    """B = sum p_i B_i at fixed A; then B A = U S V' gives A <- V', B <- U S (Lee et al., NeurIPS 2025).

    The mean is exact, since all silos share A, and the SVD changes the factors, not their product. Orthonormal rows of
    A bound the gradient of B, which is what noise and clipping act on. Only B goes up. The SVD is taken after every
    round; the first round trains with A as it was drawn.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return OneFactor(received, silo_state, place, "B")

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        both = super().expected_update(parameters, place)
        return {name: shape for name, shape in both.items() if ".lora_B." in name}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped, state = super().server_step(parameters, accumulator, state, step)
        for name in parameters:
            if ".lora_A." in name:
                other = name.replace(".lora_A.", ".lora_B.")
                stepped[name], stepped[other] = orthonormal(stepped[name], stepped[other])
        return stepped, state


def orthonormal(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """V' [r, d_in] with orthonormal rows and U S [d_out, r] of B A = U S V', in fp64, without the product.

    With A' = Q T it is the SVD of the small B T' [d_out, r] whose V is turned by Q. Rows of V' are orthonormal whatever
    the rank of B A.
    """
    q, t = torch.linalg.qr(a.double().t())
    u, s, v = torch.linalg.svd(b.double() @ t.t(), full_matrices=False)
    return (v @ q.t()).float(), (u * s).float()
