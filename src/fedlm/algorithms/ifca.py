"""IFCA: k models, and every silo works on the one that fits its rows best."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Fields, Tensors
from fedlm.randomness import torch_generator

CHOICE = "choice"
"""The chosen cluster: one-hot [k] in an update, its number in the silo's state."""

WEIGHTS = "weights"
"""In the server's state: what the silos of each cluster counted for in the last round, [k]."""

ROWS = 64
"""Training rows on which a silo compares the models."""


class IFCA(FedAvg):
    """Silo i picks j = argmin_j F_i(theta_j), trains theta_j and sends its update with its choice; the server moves
    each theta_j by the mean update of the silos that chose it (Ghosh et al., NeurIPS 2020, algorithm 1, with model
    averaging).

    k is the recipe's `clusters`. F_i is measured on the same 64 (keyed) training rows of the silo in every round. The
    way down carries k models, the way up one.

    The paper starts the models at different random points. Adapters start at the base model, all alike, and all silos
    would choose the first: here LoRA's B (IA3's scales) start with normal noise of deviation `cluster_noise` that
    differs from cluster to cluster. As in the paper, clusters are found only if the starts are different enough, and a
    cluster that nobody chooses stays as it is.

    A silo is measured with the model it chose last (the first model if it never trained). The adapter that a run leaves
    is that of the cluster whose silos counted for most in the last round; the others are in the checkpoint.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        values = super().initial(first)
        # Keyed by the first values, which follow the run's seed.
        digest = hashlib.sha256(b"".join(value.contiguous().numpy().tobytes() for value in values.values())).digest()
        seed = int.from_bytes(digest[:4], "big")
        clusters: Tensors = {}
        for j in range(self.spec.clusters):
            for name, value in values.items():
                noise = torch.randn(value.shape, generator=torch_generator(seed, "cluster", j, name))
                deviation = 0.0 if ".lora_A." in name else self.spec.cluster_noise
                clusters[f"cluster/{j}/{name}"] = torch.add(value, noise, alpha=deviation)
        return clusters

    def init_state(self, parameters: Tensors) -> Tensors:  # noqa: ARG002
        return {WEIGHTS: torch.zeros(self.spec.clusters)}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Chooser(received, silo_state, place, self.spec.clusters)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:  # noqa: ARG002
        return cluster(received, int(silo_state[CHOICE]) if silo_state else 0)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:  # noqa: ARG002
        shapes = {name: value.shape for name, value in cluster(parameters, 0).items()}
        return {**shapes, CHOICE: torch.Size([self.spec.clusters])}

    def accumulator(self, spool: Path) -> Accumulator:  # noqa: ARG002
        return Clusters()

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Clusters)
        j = int(update[CHOICE].argmax())
        accumulator.of.setdefault(j, Accumulator()).add(
            {name: update[name] for name in update if name != CHOICE}, weight
        )
        accumulator.members.setdefault(j, []).append(place.silo)
        accumulator.weight += weight
        accumulator.count += 1

    def server_step(
        self,
        parameters: Tensors,
        accumulator: Accumulator,
        state: Tensors,  # noqa: ARG002
        *,
        silos_total: int,  # noqa: ARG002
        round_: int,  # noqa: ARG002
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Clusters)
        stepped, weights = dict(parameters), torch.zeros(self.spec.clusters)
        for j, chosen in accumulator.of.items():
            weights[j] = chosen.weight
            for name, mean in chosen.mean():
                stepped[f"cluster/{j}/{name}"] = torch.add(
                    parameters[f"cluster/{j}/{name}"], mean, alpha=self.server_lr
                )
        return stepped, {WEIGHTS: weights}

    def measure(
        self,
        before: tuple[Tensors, Tensors],  # noqa: ARG002
        accumulator: Accumulator,
        after: tuple[Tensors, Tensors],  # noqa: ARG002
        round_: int,  # noqa: ARG002
    ) -> Fields:
        """Which silos chose which cluster."""
        assert isinstance(accumulator, Clusters)
        return {"clusters": [accumulator.members.get(j, []) for j in range(self.spec.clusters)]}

    def exported(self, parameters: Tensors, state: Tensors) -> Tensors:
        return cluster(parameters, int(state[WEIGHTS].argmax()))


@dataclass
class Clusters(Accumulator):
    """One sum for each cluster that was chosen, and who chose it."""

    of: dict[int, Accumulator] = field(default_factory=dict)
    members: dict[int, list[str]] = field(default_factory=dict)


class Chooser(LocalRule):
    """IFCA in the silo."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, clusters: int) -> None:
        super().__init__(received, silo_state, place)
        self.clusters, self.choice = clusters, 0

    def start(self) -> Tensors:
        return cluster(self.received, self.choice)

    def run(self, session: Session) -> Outcome:
        losses = [session.loss(cluster(self.received, j), rows=ROWS) for j in range(self.clusters)]
        self.choice = losses.index(min(losses))
        return super().run(session)

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, _ = super().finish(trained)
        choice = torch.zeros(self.clusters)
        choice[self.choice] = 1.0
        return {**update, CHOICE: choice}, {CHOICE: torch.tensor(self.choice)}


def cluster(tensors: Tensors, j: int) -> Tensors:
    """The model of one cluster."""
    prefix = f"cluster/{j}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
