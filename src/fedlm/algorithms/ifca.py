"""IFCA: k models, and every silo works on the one that fits its rows best."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.stored import Stored
from fedlm.messages import Fields, Tensors

CHOICE = "choice"
"""The chosen cluster: one-hot [k] in an update, its number in the silo's state."""

TRAINED = "trained/"
"""Prefix in the silo's state after round 0: what it trained, from which it knows its cluster."""

WEIGHTS = "weights"
"""In the server's state: what the silos of each cluster counted for in the last round, [k]."""

ROWS = 64
"""Training rows on which a silo compares the models."""

SWEEPS = 10
"""Times that silos are regrouped in round 0 at most; each reads all updates once."""


class IFCA(FedAvg):
    """Silo i picks j = argmin_j F_i(theta_j), trains theta_j and sends its update with its choice; the server moves
    each theta_j by the mean update of the silos that chose it (Ghosh et al., NeurIPS 2020, algorithm 1, with model
    averaging).

    k is the recipe's `clusters`. F_i is measured on the same 64 (keyed) training rows of the silo in every round. The
    way down carries k models, the way up one.

    The paper starts the models at different random points. Adapters start at the base model, and from there (with
    noise or without) all silos prefer whatever was trained a little, and choose the same model for ever. So here
    round 0 is different: all silos train the one first model, and the server groups them by the directions of their
    updates (cosine; of LoRA, B's alone: A's first steps hang on chance), beginning with the most unlike ones; each
    group's mean update makes one of the k models. From round 1 on it is the paper's algorithm.

    A cluster that nobody chooses stays as it is. A silo is measured with the model it chose last; after round 0 with
    the one nearest to what it trained; with the first if it never trained. The adapter that a run leaves is that of
    the cluster whose silos counted for most in the last round; the others are in the checkpoint.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        values = super().initial(first)
        return {f"cluster/{j}/{name}": v.clone() for j in range(self.spec.clusters) for name, v in values.items()}

    def init_state(self, parameters: Tensors) -> Tensors:
        return {WEIGHTS: torch.zeros(self.spec.clusters)}

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        """All models; in round 0, when they are one, the first."""
        return parameters if round_ else {n: v for n, v in parameters.items() if n.startswith("cluster/0/")}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Chooser(received, silo_state, place, self.spec.clusters)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        if CHOICE in silo_state:
            return cluster(received, int(silo_state[CHOICE]))
        away = [
            sum(float((model[name.removeprefix(TRAINED)] - own).square().sum()) for name, own in silo_state.items())
            for model in (cluster(received, j) for j in range(self.spec.clusters))
        ]
        return cluster(received, away.index(min(away)))

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        shapes = {name: value.shape for name, value in cluster(parameters, 0).items()}
        return {**shapes, CHOICE: torch.Size([self.spec.clusters])}

    def accumulator(self, spool: Path) -> Accumulator:
        return Clusters(spool)

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Clusters)
        accumulator.keep(update, weight, place)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Clusters)
        names, k = list(cluster(parameters, 0)), self.spec.clusters
        if step.round == 0:
            accumulator.choices = grouped(lambda: map(_flat, accumulator.tensors(compared(names))), k)
        else:
            accumulator.choices = [int(update[CHOICE].argmax()) for update in accumulator.tensors([CHOICE])]
        stepped, weights = accumulator.stepped(parameters, k, self.server_lr)
        return stepped, {WEIGHTS: weights}

    def measure(
        self,
        before: tuple[Tensors, Tensors],
        accumulator: Accumulator,
        after: tuple[Tensors, Tensors],
        round_: int,
    ) -> Fields:
        """Which silos are in which cluster."""
        assert isinstance(accumulator, Clusters)
        return {"clusters": accumulator.members(self.spec.clusters)}

    def exported(self, parameters: Tensors, state: Tensors) -> Tensors:
        return cluster(parameters, int(state[WEIGHTS].argmax()))


class Clusters(Stored):
    """A round's updates and, after the server's step, the cluster of each."""

    def __init__(self, spool: Path) -> None:
        super().__init__(spool, summed=False)
        self.choices: list[int] = []

    def tensors(self, names: Sequence[str]) -> Iterable[Tensors]:
        return (update for _, update in self.read(names))

    def stepped(self, parameters: Tensors, clusters: int, rate: float) -> tuple[Tensors, Tensor]:
        """The models after a step of this rate by the mean of those that chose them, and the weights of these [k]."""
        sums = [Accumulator() for _ in range(clusters)]
        for j, (kept, update) in zip(self.choices, self.read(list(cluster(parameters, 0))), strict=True):
            sums[j].add(update, kept.weight)
        after = dict(parameters)
        for j, chosen in enumerate(sums):
            for name, mean in chosen.mean() if chosen.count else ():
                after[f"cluster/{j}/{name}"] = torch.add(parameters[f"cluster/{j}/{name}"], mean, alpha=rate)
        return after, torch.tensor([chosen.weight for chosen in sums])

    def members(self, clusters: int) -> list[list[str]]:
        """By model, the silos that chose it."""
        found: list[list[str]] = [[] for _ in range(clusters)]
        for j, kept in zip(self.choices, self.kept, strict=True):
            found[j].append(kept.place.silo)
        return found


class Chooser(LocalRule):
    """IFCA in the silo. Its state says which cluster is its own."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, clusters: int) -> None:
        super().__init__(received, silo_state, place)
        self.clusters, self.choice = clusters, 0

    def start(self) -> Tensors:
        return cluster(self.received, self.choice)

    def run(self, session: Session) -> Outcome:
        if self.place.round:
            losses = [session.loss(cluster(self.received, j), rows=ROWS) for j in range(self.clusters)]
            self.choice = losses.index(min(losses))
        return super().run(session)

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, _ = super().finish(trained)
        choice = torch.zeros(self.clusters)
        choice[self.choice] = 1.0
        if self.place.round:
            state = {CHOICE: torch.tensor(self.choice)}
        else:
            state = {TRAINED + name: trained[name] for name in compared(trained)}
        return {**update, CHOICE: choice}, state


def cluster(tensors: Tensors, j: int) -> Tensors:
    """The model of one cluster."""
    prefix = f"cluster/{j}/"
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def compared(names: Iterable[str]) -> list[str]:
    """The tensors that tell silos apart."""
    return [name for name in names if ".lora_A." not in name]


def grouped(read: Callable[[], Iterable[Tensor]], k: int) -> list[int]:
    """The group, 0 .. k - 1, of each vector: k-means on directions.

    The first centre is the first vector, each further one the vector least like all centres before. No more than k + 1
    vectors are in memory. With fewer than k vectors every one is a group of its own.

    Args:
        read: gives the vectors, in the same order each time.
    """
    centres: list[Tensor] = []
    while len(centres) < k:
        likest = [max((float(c @ v) for c in centres), default=-1.0) for v in map(_direction, read())]
        least = likest.index(min(likest))
        if likest[least] > 1 - 1e-6:  # all are like some centre
            break
        centres.append(next(_direction(v) for i, v in enumerate(read()) if i == least))
    groups: list[int] = []
    for _ in range(SWEEPS):
        before, groups = groups, []
        sums = [torch.zeros_like(centre) for centre in centres]
        for v in map(_direction, read()):
            likeness = [float(centre @ v) for centre in centres]
            groups.append(likeness.index(max(likeness)))
            sums[groups[-1]] += v
        if groups == before:
            break
        centres = [_direction(total) if total.any() else centre for total, centre in zip(sums, centres, strict=True)]
    return groups


def _direction(v: Tensor) -> Tensor:
    return torch.div(v, v.norm().clamp(min=1e-30))


def _flat(update: Tensors) -> Tensor:
    return torch.cat([update[name].reshape(-1) for name in sorted(update)])
