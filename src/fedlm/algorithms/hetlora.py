"""HetLoRA: factors of different ranks are filled up with zeros and averaged; silos prune ranks that they do not use."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.lora import LoRAMethod, Trained, factors_of
from fedlm.algorithms.lowrank import STACK
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

RANK = "rank"
"""A silo's state: the rank that it has kept."""


class HetLoRA(LoRAMethod):
    """A = sum w_i [A_i; 0], B = sum w_i [B_i, 0] with w_i = |dW_i|_F / sum_j |dW_j|_F; a silo of rank r_i gets the
    first r_i rows of A and columns of B (Cho et al., EMNLP 2024).

    The norm of a silo's change weights it, in place of its rows: a silo of more rank than its data need has a sparse
    change and counts for less. It is one number a silo, over all layers.

    In the silo, ranks prune themselves: with gamma (`rank_decay`), the loss has the penalty
    lambda |B[:, gamma r:]|_F |A[gamma r:]|_F for each layer (`rank_penalty`), and when the sum of these products is
    smaller after a round's training than before it, the silo's rank becomes gamma r, rounded down and at least 1. The
    silo keeps it, and its reply says it.

    The paper has no scale s of B A. Here what is filled up, averaged and cut is s_i B_i A_i: B travels down and counts
    in units of its own silo's s_i = alpha / r_i, so that silos of any rank load the same change in the components that
    they share.
    """

    summed = False

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return SelfPruning(received, silo_state, place, self.spec, self.adapter)

    def for_rank(self, tensors: Tensors, rank: int) -> Tensors:
        return cut(tensors, rank, self.adapter.scale(self.adapter.rank) / self.adapter.scale(rank))

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Stored)
        trained, stepped = Trained(self, (parameters, state), accumulator, step.round), dict(parameters)
        squares: dict[str, float] = {}
        for layer in trained.layers:
            for silos, b_n, a_n in trained.silos(layer):
                found = self.adapter.scale(a_n.shape[1]) ** 2 * product_squares(b_n, a_n)
                for kept, square in zip(silos, found.tolist(), strict=True):
                    squares[kept.place.silo] = squares.get(kept.place.silo, 0.0) + square
        norms = {silo: math.sqrt(square) for silo, square in squares.items()}
        if not any(norms.values()):  # nobody has learnt anything
            norms = dict.fromkeys(norms, 1.0)
        for layer in trained.layers:
            a, b = factors_of(layer)
            stepped[a], stepped[b] = torch.zeros_like(parameters[a]), torch.zeros_like(parameters[b])
            among = sum(norms[kept.place.silo] for kept in accumulator.kept if a in kept.layout)
            for silos, update in accumulator.read_together((a, b), STACK):
                start, r = trained.start(silos[0].place), silos[0].place.rank
                w = torch.tensor([norms[kept.place.silo] / among for kept in silos])
                ratio = self.adapter.scale(r) / self.adapter.scale(self.adapter.rank)
                for into, name, c in ((stepped[a][:r], a, 1.0), (stepped[b][:, :r], b, ratio)):  # of start + update
                    into.add_(start[name], alpha=c * float(w.sum()))
                    into.add_(torch.tensordot(w, update[name], 1), alpha=c)
        return stepped, state


class SelfPruning(LocalRule):
    """HetLoRA in the silo. Its state is its rank."""

    def __init__(
        self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec, adapter: AdapterSpec
    ) -> None:
        super().__init__(received, silo_state, place)
        self.spec, self.adapter = spec, adapter
        self.rank = min(place.rank, int(silo_state[RANK])) if RANK in silo_state else place.rank
        self.pruned = max(1, int(round(spec.rank_decay * self.rank, 9)))
        self.values = self.at_rank(self.rank)

    def at_rank(self, rank: int) -> Tensors:
        return cut(self.received, rank, self.adapter.scale(self.place.rank) / self.adapter.scale(rank))

    def start(self) -> Tensors:
        return self.values

    def correct(self, parameters: dict[str, Parameter]) -> None:
        """The penalty's gradient: lambda |A_tail| B_tail / |B_tail| for B, and the other way round for A."""
        for name in parameters:
            if ".lora_A." not in name:
                continue
            a, b = parameters[name], parameters[name.replace(".lora_A.", ".lora_B.")]
            tail_a, tail_b = a.detach()[self.pruned :], b.detach()[:, self.pruned :]
            norm_a, norm_b = tail_a.norm(), tail_b.norm()
            if norm_a > 0 and norm_b > 0 and a.grad is not None and b.grad is not None:
                a.grad[self.pruned :] += self.spec.rank_penalty * norm_b / norm_a * tail_a
                b.grad[:, self.pruned :] += self.spec.rank_penalty * norm_a / norm_b * tail_b

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        if self.tail(trained) < self.tail({name: self.values[name] for name in trained}):
            trained = cut(trained, self.pruned, self.adapter.scale(self.rank) / self.adapter.scale(self.pruned))
            self.rank = self.pruned
        start = self.at_rank(self.rank)
        return {n: value - start[n] for n, value in trained.items()}, {RANK: torch.tensor(float(self.rank))}

    def run(self, session: Session) -> Outcome:
        outcome = super().run(session)
        outcome.fields["rank"] = self.rank
        return outcome

    def tail(self, values: Tensors) -> float:
        """sum over layers of |B[:, gamma r:]|_F |A[gamma r:]|_F."""
        return sum(
            float(a[self.pruned :].norm() * values[n.replace(".lora_A.", ".lora_B.")][:, self.pruned :].norm())
            for n, a in values.items()
            if ".lora_A." in n
        )


def cut(tensors: Tensors, rank: int, ratio: float) -> Tensors:
    """The first `rank` rows of A, and columns of B times `ratio`."""
    return {name: v[:rank] if ".lora_A." in name else v[:, :rank] * ratio for name, v in tensors.items()}


def product_squares(b: Tensor, a: Tensor) -> Tensor:
    """|B A|_F^2 [n] of B [n, d_out, r] and A [n, r, d_in], without the products: trace((B' B) (A A'))."""
    return ((b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))).sum((1, 2), dtype=torch.float64).clamp(min=0)
