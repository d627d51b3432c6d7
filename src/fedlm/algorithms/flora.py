"""FLoRA: the silos' factors are stacked, and their product is merged; every round begins with a fresh adapter."""

from __future__ import annotations

import math

import torch

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.lora import LoRAMethod, Trained, factors_of, layers_of
from fedlm.algorithms.lowrank import add_up
from fedlm.algorithms.merged import dense_from, merged
from fedlm.algorithms.stored import Stored
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator


class FLoRA(LoRAMethod):
    """W <- W + B A with the stacks A = [p_1 s_1 A_1; p_2 s_2 A_2; ...] and B = [B_1, B_2, ...]; then A is drawn anew
    and B = 0 (Wang et al., NeurIPS 2024).

    B A = sum_i p_i s_i B_i A_i, so aggregation is exact, whatever the silos' ranks. The paper scales by p_i; here each
    silo's own s_i = alpha / r_i is in the stack as well, so that what is merged is what silos of different ranks really
    added. It stays beside W as fp32 factors: the way down grows by the silos' ranks together in every round, until a
    dense matrix is smaller (see `merged`); `recompress` cuts it.

    Factors lose nothing of earlier rounds. A dense sum is rounded in every round, as near as fp32 comes: |error| is
    0.43 2^-24 |sum|. Relative to the round's mean that is below 1e-5 while the mean is above 1/390 of the sum: with a
    rate that falls to 0 by a cosine over 60 rounds, 7e-6 in round 50 and 6e-4 in the last (1/22,000).

    The global model is the deltas alone. Every silo draws a round's A for itself, keyed by the run's seed and the
    round, as LoRA's first A is drawn. A layer that no silo has trained yet still has its first factors.
    """

    summed = False

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Restarted(received, silo_state, place)

    def for_rank(self, tensors: Tensors, rank: int) -> Tensors:
        """First factors (B = 0) of the silo's rank; the deltas are the same for all."""
        return {
            name: v[:rank] if ".lora_A." in name else v[:, :rank].contiguous() if ".lora_B." in name else v
            for name, v in tensors.items()
        }

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Stored)
        trained = Trained(self, (parameters, state), accumulator, step.round)
        changes = (
            (layer, add_up(trained.terms(layer), *shape, limit=dense_from(*shape)))
            for layer, shape in trained.layers.items()
        )
        stepped = merged(parameters, changes, str(step.round), self.spec.recompress)
        spent = {name for layer in trained.layers for name in factors_of(layer)}
        return {name: value for name, value in stepped.items() if name not in spent}, state


class Restarted(LocalRule):
    """FLoRA in the silo: where something was merged into a layer, training begins with a new A and B = 0."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place) -> None:
        super().__init__(received, silo_state, place)
        self.values = dict(received)
        for layer, (d_out, d_in) in layers_of(received).items():
            a, b = factors_of(layer)
            if a not in received:
                bound = 1.0 / math.sqrt(d_in)
                draw = torch_generator(place.seed, "flora", layer, place.round)
                self.values[a] = torch.empty(place.rank, d_in).uniform_(-bound, bound, generator=draw)
                self.values[b] = torch.zeros(d_out, place.rank)

    def start(self) -> Tensors:
        return self.values
