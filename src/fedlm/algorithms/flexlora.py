"""FlexLoRA: the silos' changes are averaged, and an SVD gives every silo the best part of its rank."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.lora import LoRAMethod, Trained, factors_of
from fedlm.algorithms.lowrank import LowRank, add_up, truncated
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator


class FlexLoRA(LoRAMethod):
    """dW = sum p_i s_i B_i A_i = U S V'; a silo of rank r gets B = U_r S_r / s_r, A = V_r' (Bai et al., NeurIPS 2024).

    Of all matrices of rank r, s_r B A is the nearest to the mean change; what is lost is the tail of S. The first rows
    of A and columns of B are those of every smaller rank, so that the global model of the adapter's rank serves all.
    The paper has no s; with s_r = alpha / r of each silo's own rank, dW is what the silos really added, and B is
    divided by the s of the silo that gets it.

    `svd: exact` (the default) loses nothing more than that tail; `svd: randomised` takes less time and has in practice
    at most 1.01 times its error. Where dW has a smaller rank than the adapter, A is filled up with the directions of
    the A before, orthonormal to the others, and B with zeros: so all of the adapter can still be trained.
    """

    summed = False

    def for_rank(self, tensors: Tensors, rank: int) -> Tensors:
        most = self.adapter.rank
        if rank == most:
            return tensors
        ratio = self.adapter.scale(most) / self.adapter.scale(rank)
        return {name: v[:rank] if ".lora_A." in name else v[:, :rank] * ratio for name, v in tensors.items()}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Stored)
        trained, stepped = Trained(self, (parameters, state), accumulator, step.round), dict(parameters)
        seed, most = accumulator.kept[0].place.seed, self.adapter.rank
        for layer, shape in trained.layers.items():
            a, b = factors_of(layer)
            draw = torch_generator(seed, "svd", layer, step.round) if self.spec.svd == "randomised" else None
            best = filled(truncated(add_up(trained.terms(layer), *shape), most, generator=draw), parameters[a])
            stepped[a], stepped[b] = best.A, best.B / self.adapter.scale(most)
        return stepped, state


def filled(matrix: LowRank, a: Tensor) -> LowRank:
    """The same product with as many rows of A [r, d_in] as `a` has, all orthonormal where d_in allows it."""
    short = len(a) - len(matrix.A)
    if short == 0:
        return matrix
    rows = torch.linalg.qr(torch.cat([matrix.A, a]).double().t()).Q.t()[len(matrix.A) : len(a)].float()
    return LowRank(torch.cat([matrix.B, torch.zeros(len(matrix.B), short)], dim=1), torch.cat([matrix.A, rows]))
