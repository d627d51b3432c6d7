"""Fed-SB: fixed A and B from the silos' first full gradient; a small square matrix between them is all that travels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.lora_xs import LoRAXS, layers_of
from fedlm.messages import Fields, Tensors
from fedlm.training.sketch import LEFT, RIGHT, factors, sketch_gradient, width


class FedSB(LoRAXS):
    """dW = s B R A with fixed B, A; silos train R [r, r], the server averages it (Singhal et al., 2025).

    mean(B R_i A) = B mean(R_i) A, so aggregation is exact, and an update has r^2 numbers a layer whatever its size.

    Round 0 is LoRA-SB's initialisation (Ponkshe et al., 2024): B = U_r and A = V_r' of the truncated SVD of the first
    full step of fine-tuning. Silos send two-sided sketches of the mean full gradient G_i over the rows of one round
    (`fedlm.training.sketch`), the server averages them, and U_r, V_r are those of the mean gradient sum p_i G_i, nearly
    (`sketch.factors`; any basis of their spans does, since R is a full matrix): no silo's gradient travels in full or
    is even held. It costs 2 r (d_in + d_out) numbers a layer once, twice a LoRA update. From round 1 on A and B are
    constants.

    Two things differ from the paper. It decomposes the sign of a gradient, AdamW's first step; here it is the gradient
    itself, since signs cannot be sketched and a mean of signs is no sign of a mean. And R starts at 0 instead of
    S_r / s, since without AdamW's normalisation S has the gradient's scale, not a step's: after round 0 the model is
    the base.

    With orthonormal B and A a step of AdamW moves dW by about s r lr in Frobenius norm, less than it moves LoRA's by a
    factor of order sqrt(d_out / r): learning rates want to be some ten times LoRA's.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        return first()

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        if place.round == 0:
            return Sketching(received, silo_state, place, self.adapter.rank)
        return super().local(received, silo_state, place)

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        return parameters if round_ else {}

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        if place.round:
            return super().expected_update(parameters, place)
        r, shapes = self.adapter.rank, {}
        for layer in layers_of(parameters):
            d_out, d_in = len(parameters[f"{layer}.lora_B.weight"]), parameters[f"{layer}.lora_A.weight"].shape[1]
            shapes[f"{layer}.{LEFT}"] = torch.Size((d_out, width(r, d_in)))
            shapes[f"{layer}.{RIGHT}"] = torch.Size((width(r, d_out), d_in))
        return shapes

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        if place.round:
            super().fold(accumulator, update, weight, place)
        else:
            accumulator.add(update, weight)  # of sketches the mean is all that matters

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        if step.round:
            return super().server_step(parameters, accumulator, state, step)
        mean, stepped = dict(accumulator.mean()), dict(parameters)
        for layer in layers_of(parameters):
            y, z = mean[f"{layer}.{LEFT}"], mean[f"{layer}.{RIGHT}"]
            b, a = factors(y, z, self.adapter.rank)
            stepped[f"{layer}.lora_B.weight"], stepped[f"{layer}.lora_A.weight"] = b, a
        return stepped, state

    def measure(
        self, before: tuple[Tensors, Tensors], accumulator: Accumulator, after: tuple[Tensors, Tensors], round_: int
    ) -> Fields:
        """See `LoRAXS`; None in round 0."""
        return super().measure(before, accumulator, after, round_) if round_ else {"aggregation_error": None}


class Sketching(LocalRule):
    """Round 0 in the silo: what leaves it is a sketch of its gradient; nothing is trained."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, rank: int) -> None:
        super().__init__(received, silo_state, place)
        self.rank = rank

    def run(self, session: Session) -> Outcome:
        for name, parameter in session.put(self.received).items():
            parameter.requires_grad_(".lora_R." in name)  # so that gradients reach every layer
        place, recipe = self.place, session.recipe
        result, sketches = sketch_gradient(
            session.model,
            session.tokens,
            recipe.training,
            self.rank,
            seed=recipe.seed,
            generator_key=(recipe.seed, place.silo),
            objective=session.objective(),
            observe=session.observe,
            silo=place.silo,
            should_stop=session.should_stop,
        )
        return Outcome(result, sketches, {})
