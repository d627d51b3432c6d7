"""FedKSeed: full weights tuned without gradients, for a few kilobytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.zeroth import ZerothOrder
from fedlm.messages import Tensors
from fedlm.models.directions import SCALARS, direction
from fedlm.randomness import numpy_generator
from fedlm.training.batches import steps_per_round

STEPS = "fedkseed.steps"
"""Name of an update: fp32 [steps], eta_t g_t of each local step t."""


class FedKSeed(FedAvg):
    """Zeroth-order steps along K candidate directions: w = w0 - sum_k a_k z_k (Qin et al., ICML 2024, algorithm 1).

    A local step draws one of the K seeds, measures the projected gradient g along its z and goes eta g backwards; what
    leaves the silo is a scalar per step. The server adds p_i eta_t g_t to the accumulator a_k of the step's seed, which
    is FedAvg of the silos' models without ever having one, and sends the K accumulators. Silos rebuild the weights
    from the base, in the seeds' order.

    Two things differ from the paper's text. The scalar holds the step's learning rate, so that schedules are possible
    (the paper has one rate for all steps and lets the receiver multiply). And which seed a step uses is a draw keyed by
    (run's seed, silo, round), which the coordinator repeats instead of being told: 4 bytes a step, not 8. The paper's
    FedKSeed-Pro (seeds drawn by their past amplitude) is not built.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        return {SCALARS: torch.zeros(self.spec.seeds)}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return SeededSteps(received, silo_state, place, self.spec)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {STEPS: torch.Size([place.steps])}

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        drawn = candidates(place, self.spec.seeds, place.steps)
        scalars = torch.zeros(self.spec.seeds).index_add_(0, drawn, update[STEPS].to(torch.float32))
        accumulator.add({SCALARS: scalars}, weight)


class SeededSteps(ZerothOrder):
    """FedKSeed in the silo."""

    def run(self, session: Session) -> Outcome:
        steps = steps_per_round(session.recipe.training, len(session.tokens))
        seeds = candidates(self.place, self.spec.seeds, steps).tolist()
        scalars = torch.zeros(steps)

        def stride(step: int, slope: float, rate: float) -> float:
            scalars[step] = rate * slope
            return -float(scalars[step])  # as it is sent: rounded to fp32

        weights = session.put(self.received)
        result = self.go(session, weights, lambda step: direction(self.place.seed, seeds[step]), stride)
        return Outcome(result, {STEPS: scalars[: result.steps].clone()}, {})


def candidates(place: Place, seeds: int, steps: int) -> Tensor:
    """Which of the `seeds` candidates each of a silo's first `steps` local steps in a round uses: int64 [steps]."""
    drawn = numpy_generator(place.seed, "candidates", place.silo, place.round)
    return torch.from_numpy(drawn.integers(seeds, size=steps))
