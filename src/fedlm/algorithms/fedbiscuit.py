"""FedBiscuit: several selectors, each of an equal share of the silos, regrouped by loss every few rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, LocalRule, Outcome, Place, Session, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.ifca import CHOICE, ROWS, WEIGHTS, Clusters, cluster
from fedlm.messages import Fields, Tensors
from fedlm.randomness import key, numpy_generator
from fedlm.recipe.schema import AlgorithmSpec

LOSSES = "losses"
"""In the updates of a round after which silos are regrouped: the loss of each selector on the silo's rows, [k]."""

GROUPS = "groups"
"""In the server's state, and sent to silos: (digest of the silo's name, its selector), int64 [n + 1, 2]. The first row
is none, so that it is never empty."""


class FedBiscuit(FedAvg):
    """k selectors phi_j. First each is trained by all silos for W rounds, one after the other. Then, every tau rounds,
    silos are grouped: each says its loss of every phi_j, and the server deals the silos to the selectors that fit them
    best, no more to one than to another; until the next grouping phi_j is moved by the mean update of its group
    (Wu et al., ICLR 2025). With k = 1 it would be their FedBis, which is `fedavg`.

    k is the recipe's `clusters`, W `warm_rounds`, tau `regroup`. The paper measures losses in an exchange of its own,
    here they travel with the updates of the round before, so they are of the selectors as that round began (and tau is
    2 at least: groups that go by old losses in every round can change places for ever). They are measured on the same
    64 (keyed) training rows of a silo each time. A silo that has no group, since it had no part in the last round that
    measured, trains the selector that fits its rows best.

    While there are no groups, silos are measured with the selector trained last; later with their group's, or the
    first. The adapter that a run leaves is that of the group that counted for most in the last round; the others are in
    the checkpoint, and vote in `fedlm.inference.selectors`.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        values = super().initial(first)
        return {f"cluster/{j}/{name}": v.clone() for j in range(self.spec.clusters) for name, v in values.items()}

    def init_state(self, parameters: Tensors) -> Tensors:
        weights = torch.zeros(self.spec.clusters)
        return {WEIGHTS: weights, GROUPS: torch.full((1, 2), -1, dtype=torch.int64)}

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        """All selectors and the groups; in the warm-up the one that is trained, until losses are asked for."""
        if round_ < warm_up(self.spec) and not asks(self.spec, round_):
            own = f"cluster/{round_ // self.spec.warm_rounds}/"
            return {name: value for name, value in parameters.items() if name.startswith(own)}
        return {**parameters, GROUPS: state[GROUPS]}

    def evaluated(self, parameters: Tensors, state: Tensors) -> Tensors:
        if len(state[GROUPS]) > 1:
            return {**parameters, GROUPS: state[GROUPS]}
        return {f"cluster/0/{name}": value for name, value in self.exported(parameters, state).items()}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Member(received, silo_state, place, self.spec)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return cluster(received, max(0, group_of(received, place.silo)))

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        k = torch.Size([self.spec.clusters])
        shapes = {name: value.shape for name, value in cluster(parameters, 0).items()}
        return {**shapes, CHOICE: k, **({LOSSES: k} if asks(self.spec, place.round) else {})}

    def accumulator(self, spool: Path) -> Accumulator:
        return Clusters(spool)

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Clusters)
        accumulator.keep(update, weight, place)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        assert isinstance(accumulator, Clusters)
        accumulator.choices = [int(update[CHOICE].argmax()) for update in accumulator.tensors([CHOICE])]
        stepped, weights = accumulator.stepped(parameters, self.spec.clusters, self.server_lr)
        groups = self._regrouped(accumulator, state, step) if asks(self.spec, step.round) else state[GROUPS]
        return stepped, {WEIGHTS: weights, GROUPS: groups}

    def _regrouped(self, accumulator: Clusters, state: Tensors, step: Step) -> Tensor:
        """The groups by this round's losses; silos that had no part in it keep theirs."""
        names = [kept.place.silo for kept in accumulator.kept]
        losses = [update[LOSSES].tolist() for update in accumulator.tensors([LOSSES])]
        seed = accumulator.kept[0].place.seed
        order = numpy_generator(seed, "fedbiscuit", step.round).permutation(len(names)).tolist()
        groups = {int(digest): int(j) for digest, j in state[GROUPS].tolist()}
        groups |= {digest(names[i]): j for i, j in balanced(losses, order).items()}
        return torch.tensor(sorted(groups.items()), dtype=torch.int64)

    def measure(
        self,
        before: tuple[Tensors, Tensors],
        accumulator: Accumulator,
        after: tuple[Tensors, Tensors],
        round_: int,
    ) -> Fields:
        """Which silos trained which selector."""
        assert isinstance(accumulator, Clusters)
        return {"clusters": accumulator.members(self.spec.clusters)}

    def exported(self, parameters: Tensors, state: Tensors) -> Tensors:
        return cluster(parameters, int(state[WEIGHTS].argmax()))


class Member(LocalRule):
    """FedBiscuit in the silo."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec = spec
        warming = place.round < warm_up(spec)
        self.choice = place.round // spec.warm_rounds if warming else group_of(received, place.silo)
        self.losses: list[float] = []

    def start(self) -> Tensors:
        return cluster(self.received, self.choice)

    def run(self, session: Session) -> Outcome:
        if asks(self.spec, self.place.round) or self.choice < 0:
            self.losses = [session.loss(cluster(self.received, j), rows=ROWS) for j in range(self.spec.clusters)]
        if self.choice < 0:
            self.choice = self.losses.index(min(self.losses))
        return super().run(session)

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, _ = super().finish(trained)
        choice = torch.zeros(self.spec.clusters)
        choice[self.choice] = 1.0
        asked = {LOSSES: torch.tensor(self.losses)} if asks(self.spec, self.place.round) else {}
        return {**update, CHOICE: choice, **asked}, {}


def warm_up(spec: AlgorithmSpec) -> int:
    """Rounds before there are groups."""
    return spec.clusters * spec.warm_rounds


def asks(spec: AlgorithmSpec, round_: int) -> bool:
    """Whether silos are regrouped after this round: first at the end of the warm-up, then every `regroup` rounds."""
    since = round_ + 1 - warm_up(spec)
    return since >= 0 and since % spec.regroup == 0


def digest(silo: str) -> int:
    """What stands for a silo's name where other silos see it."""
    return key(0, "group", silo)


def group_of(received: Tensors, silo: str) -> int:
    """The selector that a silo was dealt to; -1 for none."""
    rows = received[GROUPS].tolist() if GROUPS in received else []
    return next((int(j) for name, j in rows if name == digest(silo)), -1)


def balanced(losses: Sequence[Sequence[float]], order: Sequence[int]) -> dict[int, int]:
    """Deal silos to selectors so that group sizes differ by one at most.

    Every silo asks for the open selector of its lowest loss. The selector that most ask for takes the first
    ceil(silos without a group / open selectors) of them and is closed, and the others ask again.

    Args:
        losses: of each silo, [k].
        order: in which silos that ask for the same selector are taken.

    Returns:
        The selector of each silo, by number.
    """
    groups: dict[int, int] = {}
    asking: dict[int, list[int]] = {j: [] for j in range(len(losses[0]))}
    waiting = list(order)
    while waiting or any(asking.values()):
        for i in waiting:
            asking[min(asking, key=lambda j: losses[i][j])].append(i)
        size = math.ceil((len(losses) - len(groups)) / len(asking))
        fullest = max(asking, key=lambda j: len(asking[j]))
        taken, waiting = asking[fullest][:size], asking.pop(fullest)[size:]
        groups |= dict.fromkeys(taken, fullest)
    return groups
