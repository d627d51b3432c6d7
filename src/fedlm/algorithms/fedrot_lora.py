"""FedRot-LoRA: silos turn their factors towards the global ones before they are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.base import LocalRule, Place
from fedlm.algorithms.fedit import FedIT
from fedlm.messages import Tensors


class FedRotLoRA(FedIT):
    """A silo sends B_i Q_i and Q_i' A_i with the orthogonal Q_i [r, r] that brings them nearest to the global factors
    it began with (Zhang et al., ICML 2026).

    (B_i Q)(Q' A_i) = B_i A_i: the silo's change is the same, but factors that mean the same lie alike and do not cancel
    in the mean. As in the paper the first round turns nothing, and then the reference is A in one round and B in the
    next. Q_i solves the orthogonal Procrustes problem, min |Q' A_i - A| or min |B_i Q - B| (Schoenemann, 1966). The
    paper's lambda (`rotation`) below 1 turns less: to the orthogonal matrix nearest to (1 - lambda) I + lambda Q.

    The authors' code only allows det Q = 1; here, as in their formula, reflections are allowed.

    Silos that begin a round with the same factors leave little to turn back: with some ten local steps the error is
    FedIT's within some percent, on either side. It is far below where their factors really have turned.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Turned(received, silo_state, place, self.spec.rotation)


class Turned(LocalRule):
    """FedRot-LoRA in the silo."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, rotation: float) -> None:
        super().__init__(received, silo_state, place)
        self.rotation = rotation

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        if self.place.round == 0:
            return super().finish(trained)
        turned = dict(trained)
        for name in trained:
            if ".lora_A." in name:
                other = name.replace(".lora_A.", ".lora_B.")
                a, b = trained[name], trained[other]
                if self.place.round % 2:
                    q = aligning(a @ self.received[name].t(), self.rotation)
                else:
                    q = aligning(b.t() @ self.received[other], self.rotation)
                turned[name], turned[other] = q.t() @ a, b @ q
        return super().finish(turned)


def aligning(m: Tensor, rotation: float) -> Tensor:
    """Q [r, r], orthogonal: argmax trace(Q' m), or part of the way there from the identity."""
    q = _nearest_orthogonal(m.double())
    if rotation < 1:
        q = _nearest_orthogonal(torch.lerp(torch.eye(len(q), dtype=q.dtype), q, rotation))
    return q.float()


def _nearest_orthogonal(m: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(m)
    q: Tensor = u @ v
    return q
