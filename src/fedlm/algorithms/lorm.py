"""LoRM: LoRA factors merged so that the merged layer answers as the silos' own layers do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors
from fedlm.models.adapters import lora_layers
from fedlm.recipe.schema import AlgorithmSpec

ROWS = 64
"""Training rows on which a silo measures its layers' inputs."""

SMALLEST = 1e-5
"""Eigenvalues of a Gram matrix below this share of the largest count as 0: fp32 products say nothing about them."""


class LoRM(FedAvg):
    """One factor is trained at a time and merged in closed form: the one whose layer outputs are nearest to those of
    the silos' own factors on the silos' own inputs X_i (Salami et al., ICLR 2025; after RegMean, Jin et al., ICLR
    2023).

        even rounds, B:  argmin_B sum_i p_i |(B - B_i) A X_i|^2 = (sum_i p_i B_i C_i) (sum_i p_i C_i)^-1
        odd rounds, A:   A = (sum_i p_i A_i D_i) (sum_i p_i D_i)^-1

    C_i = A X_i X_i' A' / tokens is the Gram matrix in the space of the rank, [r, r], and D_i the diagonal of X_i X_i' /
    tokens, [d_in]: of the full Gram matrix, which would be d_in / r times as large as an update, the paper too sends no
    more than the diagonal; with it, A is a mean weighted by how strong each input is in each silo. RegMean's scaling of
    C_i's off-diagonal values is `gram_off_diagonal`; 1, the default, is the exact minimiser. Where C_i has no inverse
    the solution nearest to the present B is taken.

    X_i are what reaches the layer in the silo's trained model on 64 (keyed) of its training rows. A silo sends the
    products (B_i - B) C_i and C_i, so that the server needs sums alone. The Gram values travel beside the factors:
    r^2 or d_in numbers for each layer. `server_lr` shortens the step to the merged factor.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Regressed(received, silo_state, place, self.spec)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        shapes: dict[str, torch.Size] = {}
        for name, value in parameters.items():
            if turn(place.round) in name:
                shapes[name] = value.shape
                r = value.shape[1]  # r for B, d_in for A
                shapes[gram_of(name)] = torch.Size((r, r) if ".lora_B." in name else (r,))
        return shapes

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        means, stepped = dict(accumulator.mean()), dict(parameters)
        for name in parameters:
            if turn(step.round) in name:
                change = solved(means[name], means[gram_of(name)])
                stepped[name] = torch.add(parameters[name], change, alpha=self.server_lr)
        return stepped, state


class Regressed(LocalRule):
    """LoRM in the silo: train one factor, then measure what the layers read."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec = spec

    def trains(self, name: str) -> bool:
        return turn(self.place.round) in name

    def run(self, session: Session) -> Outcome:
        result, trained = session.train(self)
        grams = measured_grams(session, self.received | trained, full=turn(self.place.round) == ".lora_B.")
        u, _ = self.finish(trained)
        update: Tensors = {}
        for name, step in u.items():
            gram = grams[name.rsplit(".lora_", 1)[0]]
            if gram.ndim == 2:
                gram = gram.mul(self.spec.gram_off_diagonal).fill_diagonal_(0) + gram.diag().diag()
            update[name] = step @ gram if gram.ndim == 2 else step * gram
            update[gram_of(name)] = gram
        return Outcome(result, update, {})


def turn(round_: int) -> str:
    """What marks the names of the factor that is trained in a round: B first, since a gradient of A needs it."""
    return ".lora_A." if round_ % 2 else ".lora_B."


def gram_of(name: str) -> str:
    """The name under which a layer's Gram values travel."""
    return name.rsplit(".lora_", 1)[0] + ".gram"


def solved(product: Tensor, gram: Tensor) -> Tensor:
    """product gram^-1, fp64 inside; the smallest solution where there are several."""
    if gram.ndim == 1:
        return torch.where(gram > 0, product / gram, 0.0)
    inverse: Tensor = torch.linalg.pinv(gram.double(), rtol=SMALLEST, hermitian=True)
    return (product.double() @ inverse).float()


def measured_grams(session: Session, tensors: Tensors, *, full: bool) -> Tensors:
    """By layer, mean over tokens of z z' with z = A x [r, r], or of the squares of x [d_in] (fp32, CPU)."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}
    handles = []
    session.put(tensors)
    for layer, module in lora_layers(session.model).items():
        (factor_a,) = module.lora_A.values()

        def look(_: Module, inputs: tuple[Tensor, ...], output: Tensor, layer: str = layer) -> None:
            z = (output if full else inputs[0]).detach().float().flatten(0, -2)
            gram = z.t() @ z if full else z.square().sum(0)
            sums[layer] = sums[layer] + gram.double() if layer in sums else gram.double()
            tokens[layer] = tokens.get(layer, 0) + len(z)

        handles.append(factor_a.register_forward_hook(look))
    try:
        session.loss(tensors, rows=ROWS, alone=True)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: (total / tokens[layer]).float().cpu() for layer, total in sums.items()}
