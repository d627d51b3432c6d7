"""Partial prefixes: some layers of a prefix are shared, the others stay in their silo."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.fedavgm import FedAvgM
from fedlm.messages import Tensors

CHOSEN = "partial.chosen"
"""bool [tensors]: which of the prefix's layers, in sorted order of names, travel."""


class PartialPrefix(FedAvgM):
    """Round 0 exchanges the prefix of all layers and scores them; afterwards only the best `layer_share` of them travel
    and are averaged, with momentum at the server, while a silo goes on training the others for itself. This is
    FedPepTAO's idea with other rules (after Che et al., EMNLP 2023).

    The score of layer l is |u_l| / |theta_l|, u the mean update of round 0: how far the silos agree to move it. With
    `training.keep_optimizer` the silos' side is adaptive as well (AdamW's moments go on).

    What is theirs: prompts in every layer of which a part is exchanged, the rest of which is the device's own, and
    adaptive steps at both ends. What is not: they score layers and set the share by eigenvalues of the Hessian, here
    one round's updates do; and their server also has a control variate per device, which is left out. So it has a name
    of its own. Silos are measured with their own layers; the adapter that a run exports has those of round 0 there.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        prefix = first()
        return prefix | {CHOSEN: torch.ones(len(prefix), dtype=torch.bool)}

    def init_state(self, parameters: Tensors) -> Tensors:
        return super().init_state(layers_of(parameters))

    def evaluated(self, parameters: Tensors, state: Tensors) -> Tensors:
        return layers_of(parameters)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return received | silo_state

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return OwnLayers(received, silo_state, place)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {name: parameters[name].shape for name in chosen(parameters)}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        before = layers_of(parameters)
        after, state = super().server_step(before, accumulator, state, step)
        kept = parameters[CHOSEN]
        if step.round == 0:
            moved = {name: (after[name] - before[name]).norm() / before[name].norm() for name in before}
            kept = self.best([float(moved[name]) for name in sorted(before)])
        return after | {CHOSEN: kept}, state

    def best(self, scores: list[float]) -> Tensor:
        """bool: the layers of the highest scores, at least one; the earlier of equals."""
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        kept = torch.zeros(len(scores), dtype=torch.bool)
        kept[order[: math.ceil(self.spec.layer_share * len(scores))]] = True
        return kept


class OwnLayers(LocalRule):
    """Partial prefixes in the silo. Its state is the layers that do not travel."""

    def start(self) -> Tensors:
        return layers_of(self.received) | self.silo_state

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        shared = chosen(self.received)
        update = {name: trained[name] - self.received[name] for name in shared}
        return update, {name: value for name, value in trained.items() if name not in update}


def layers_of(parameters: Tensors) -> Tensors:
    """The prefix without the choice."""
    return {name: value for name, value in parameters.items() if name != CHOSEN}


def chosen(parameters: Tensors) -> list[str]:
    """The names of the layers that travel."""
    names = sorted(layers_of(parameters))
    return [name for name, kept in zip(names, parameters[CHOSEN].tolist(), strict=True) if kept]
