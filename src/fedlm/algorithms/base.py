"""The `Algorithm` waist: what is trained and exchanged, the local round, streaming accumulation, the server step.

Symbols: theta is the round's global model, theta_i a silo's model after local training, u_i = theta_i - theta its
update, p_i its weight. All arithmetic on updates is fp32 whatever dtype arrives.

The global model is a dictionary of tensors by name: adapter parameters, and for some methods *deltas*, fp32 matrices
that silos add to frozen weights in the forward pass (`fedlm.models.deltas`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Event, Fields, Tensors
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec, Recipe

if TYPE_CHECKING:
    from fedlm.training.encode import TokenSet
    from fedlm.training.loop import TrainResult
    from fedlm.training.objective import Objective

BLOCK = 1 << 17
"""Elements widened to fp32 at a time when an update arrives in another dtype: 512 KiB, which stays in cache."""


def weight_of(spec: AlgorithmSpec, fields: Fields) -> float:
    """A silo's weight in the mean, read from its reply: the training examples it holds (McMahan's n_k), their target
    tokens, or 1 for everybody. How much of them a round trains on does not matter: a silo that ran out of time keeps
    its weight (FedNova also evens out what fewer steps mean for the update).

    Raises:
        UpdateRefused: the reply does not say how many.
    """
    counted = {"tokens": "row_targets", "examples": "rows", "equal": None}[
        "equal" if ALGORITHMS[spec.name].equal_weights else spec.weights or "examples"
    ]
    if counted is None:
        return 1.0
    value = fields.get(counted)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UpdateRefused(f"the reply has no number '{counted}', which weights the update")
    return float(value)


def flat_view(tensors: Sequence[Tensor]) -> Tensor | None:
    """One vector over tensors that lie end to end in one buffer (as a safetensors file loads), else None.

    Hundreds of small matrices cost more in calls than in bytes; one vector costs the bytes.
    """
    if not tensors:
        return None
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.dtype is not first.dtype or not tensor.is_contiguous():
            return None
        end += tensor.nbytes
    storage = first.untyped_storage()
    if end > storage.data_ptr() + storage.nbytes():  # neighbours by chance, in buffers of their own
        return None
    return first.as_strided(((end - first.data_ptr()) // first.itemsize,), (1,))


@dataclass
class Accumulator:
    """Weighted sum of the updates folded so far: one fp32 copy of an update, however many silos there are.

    `total` maps names to views of one buffer, in sorted order of names, so that an update laid out the same way is
    added in one sweep. Every element is one fused multiply-add, whatever the layout: the bits do not depend on it.

    A silo may have trained a part of the model. It does not count for a tensor that its update lacks: a tensor's mean
    is over those that trained it, as in HeteroFL (Diao et al., ICLR 2021).
    """

    total: Tensors = field(default_factory=dict)
    weight: float = 0.0
    count: int = 0
    lacking: dict[str, tuple[float, int]] = field(default_factory=dict)
    """By tensor, of the updates without it: their weights together, and their number."""

    def add(self, update: Mapping[str, Tensor], weight: float) -> None:
        """total += weight * update, in fp32. Silos must be folded in canonical order: float sums depend on it."""
        if not self.total:
            self._lay_out(update)
        if update.keys() != self.total.keys():
            self._add_part(update, weight)
            return
        totals = list(self.total.values())
        if not isinstance(update, dict):  # read from a file: one tensor in memory at a time
            for name, total in self.total.items():
                _add_weighted(total.view(-1), update[name].reshape(-1), weight)
            self.weight += weight
            self.count += 1
            return
        tensors = [update[name] for name in self.total]
        whole, flat = flat_view(totals), flat_view(tensors)
        if whole is not None and flat is not None and whole.numel() == flat.numel():
            _add_weighted(whole, flat, weight)
        elif all(tensor.dtype is torch.float32 for tensor in tensors):
            torch._foreach_add_(totals, tensors, alpha=weight)
        else:
            for total, tensor in zip(totals, tensors, strict=True):
                _add_weighted(total.view(-1), tensor.reshape(-1), weight)
        self.weight += weight
        self.count += 1

    def add_mean(self, update: Mapping[str, Tensor], weight: float, count: int) -> None:
        """Add the mean of so many updates, with their weights together."""
        self.add(update, weight)
        self.count += count - 1

    def mean(self) -> Iterator[tuple[str, Tensor]]:
        """The weighted mean, one tensor at a time, divided in place: read it once.

        Raises:
            RunError: nothing was folded.
        """
        if not self.count:
            raise RunError("no silo's update was accepted, so there is no mean")
        for name, tensor in self.total.items():
            yield name, tensor.div_(self.weight - self.lacking.get(name, (0.0, 0))[0])

    def counted(self, name: str) -> int:
        """How many updates have this tensor."""
        return self.count - self.lacking.get(name, (0.0, 0))[1] if name in self.total else 0

    def _add_part(self, update: Mapping[str, Tensor], weight: float) -> None:
        """Add an update that has other tensors than those before."""
        for name in sorted(update.keys() - self.total.keys()):
            self.total[name] = torch.zeros(update[name].shape)
            self.lacking[name] = (self.weight, self.count)
        for name, total in self.total.items():
            if name in update:
                _add_weighted(total.view(-1), update[name].reshape(-1), weight)
            else:
                missed, count = self.lacking.get(name, (0.0, 0))
                self.lacking[name] = (missed + weight, count + 1)
        self.weight += weight
        self.count += 1

    def _lay_out(self, update: Mapping[str, Tensor]) -> None:
        shapes = {name: update[name].shape for name in sorted(update)}
        ends = list(accumulate((shape.numel() for shape in shapes.values()), initial=0))
        buffer = torch.zeros(ends[-1])
        for (name, shape), (start, end) in zip(shapes.items(), pairwise(ends), strict=True):
            self.total[name] = buffer[start:end].view(shape)


def _add_weighted(total: Tensor, update: Tensor, weight: float) -> None:
    """total += weight * update for vectors, widening block by block where the dtypes differ."""
    if update.dtype is torch.float32:
        total.add_(update, alpha=weight)
        return
    for start in range(0, total.numel(), BLOCK):
        block = slice(start, start + BLOCK)
        total[block].add_(update[block].to(torch.float32), alpha=weight)


@dataclass(frozen=True)
class Place:
    """Where a rule is at work: one silo in one round."""

    silo: str = ""
    round: int = 0
    rounds: int = 1
    seed: int = 0
    """The run's."""
    rank: int = 0
    """Of this silo's LoRA factors; 0 without LoRA."""
    steps: int = 0
    """Local steps that an update took, for the coordinator; 0 in the silo, which has yet to take them."""
    dispatch: int | None = None
    """In an asynchronous federation: the number of this training among all that were given out in the run. Its `round`
    is then the number of server steps before the model that it starts from."""
    staleness: int = 0
    """Server steps since that model, for the coordinator; known when the update arrives."""
    silos: int = 1
    """Silos whose updates make the round's mean, for the silo."""


@dataclass
class Outcome:
    """What a silo's round gave."""

    result: TrainResult
    update: Tensors
    """Leaves the silo."""
    state: Tensors
    """Stays in it until its next round."""
    fields: Fields = field(default_factory=dict)
    """Plain JSON for the reply, beside what every reply says."""


class Session(Protocol):
    """What a rule may do with its silo's model and training rows during a round."""

    place: Place
    recipe: Recipe
    model: Module
    tokens: TokenSet
    """The silo's encoded training rows."""

    def put(self, tensors: Tensors) -> dict[str, Parameter]:
        """Load these values into the model; the adapter's parameters by name."""
        ...

    def train(self, rule: LocalRule, *, purpose: str = "") -> tuple[TrainResult, Tensors]:
        """Ordinary first-order training from `rule.start()`; what happened, and the trained values (fp32, CPU).

        A second training in the same round needs a `purpose` of its own, which keys its batch order.
        """
        ...

    def loss(self, tensors: Tensors, rows: int | None = None, *, alone: bool = False) -> float:
        """Mean loss over target tokens of (a fixed subset of) the silo's training rows with these values loaded.

        `alone` reads each row in a forward pass of its own, so that layers see every token once for each row that has
        it, and no padding.
        """
        ...

    def objective(self, purpose: str = "") -> Objective:
        """What this round minimises, for rules with a loop of their own; `purpose` as in `train`."""
        ...

    def should_stop(self) -> bool: ...

    def observe(self, event: Event) -> None: ...


@dataclass(frozen=True)
class Step:
    """Which step of the server this is."""

    round: int
    silos_total: int
    """How many silos have training rows, whether or not they were asked."""


class LocalRule:
    """One silo's side of one round. The base class is plain local training (FedAvg).

    Args:
        received: what the coordinator sent.
        silo_state: what this silo kept of the last of its rounds that was aggregated; empty before.
    """

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place) -> None:
        self.received, self.silo_state, self.place = received, silo_state, place

    after_noise = False
    """What it does between steps follows from weights, public values and the gradients that it is given, and from
    nothing else of the silo: with noised gradients it tells no more than they do (see `fedlm.training.private`)."""

    def start(self) -> Tensors:
        """What the silo loads (fp32, by name): adapter parameters, and deltas of the frozen weights.

        Adapter parameters that are left out get the first value that all silos share.
        """
        return self.received

    def trains(self, name: str) -> bool:
        """Whether this parameter of the adapter is trained in this round."""
        return True

    @property
    def between_steps(self) -> bool:
        """Whether it changes weights or gradients between steps, by one of the two methods that follow."""
        return type(self).before is not LocalRule.before or type(self).correct is not LocalRule.correct

    def before(self, step: int, parameters: dict[str, Parameter]) -> None:
        """Change parameters in place; called before the forward pass of every optimiser step, counted from 0."""

    def correct(self, parameters: dict[str, Parameter]) -> None:
        """Change `.grad` in place; called once after clipping and before every optimiser step."""

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        """The update that leaves the silo and the state that stays in it, from the trained parameters (fp32)."""
        start = self.start()
        return {name: value - start[name] for name, value in trained.items()}, {}

    def run(self, session: Session) -> Outcome:
        """The whole local round."""
        result, trained = session.train(self)
        return Outcome(result, *self.finish(trained))


class Algorithm:
    """How updates become one model. The base class is FedAvg's shape; subclasses override what differs."""

    default_server_lr = 1.0
    update_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    """What an update's tensors may be."""

    def __init__(self, spec: AlgorithmSpec, adapter: AdapterSpec) -> None:
        self.spec, self.adapter = spec, adapter

    @property
    def server_lr(self) -> float:
        """eta of the server step: the recipe's, or the algorithm's own default."""
        return self.default_server_lr if self.spec.server_lr is None else self.spec.server_lr

    @property
    def cycle(self) -> int:
        """The first rounds after which updates are of no other tensors or shapes than before: set-up rounds, factors
        sent in turn."""
        return 2

    # at both ends
    def trainable(self, name: str) -> bool:
        """Whether the adapter's parameter of this name is ever trained or exchanged; the others keep their first
        values."""
        return True

    # in the silo
    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return LocalRule(received, silo_state, place)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        """What a silo loads to measure the model (`received` is what `evaluated` gave): a method with personal models
        answers with the silo's own."""
        return received

    # at the coordinator
    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        """The global model at round 0, from the adapter's shared first values."""
        return {name: value for name, value in first().items() if self.trainable(name)}

    def init_state(self, parameters: Tensors) -> Tensors:
        """The server's own tensors at round 0 (momentum, variates ...), checkpointed with the model."""
        return {}

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        """What travels to the silos for this round's training."""
        return parameters

    def evaluated(self, parameters: Tensors, state: Tensors) -> Tensors:
        """What travels to the silos to be measured."""
        return parameters

    def for_rank(self, tensors: Tensors, rank: int) -> Tensors:
        """The part of a broadcast that a silo of this LoRA rank receives."""
        return tensors

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        """Names and shapes that an update must have; anything else is refused."""
        return {name: value.shape for name, value in parameters.items()}

    def accumulator(self, spool: Path) -> Accumulator:
        """Where a round's updates are folded; `spool` is a folder for what must wait on disk."""
        return Accumulator()

    def asked(self, accumulator: Accumulator, silos: Sequence[str], place: Place) -> None:
        """Told before any of them trains: the silos asked for a round's updates, in canonical order; `place` says which
        round of which run. Not in an asynchronous federation, where silos are asked one by one.

        Raises:
            FedlmError: no good round can come of it.
        """

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        accumulator.add(update, weight)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        """The next global model and server state. May reuse the accumulator's and the state's memory."""
        raise NotImplementedError

    def measure(
        self,
        before: tuple[Tensors, Tensors],
        accumulator: Accumulator,
        after: tuple[Tensors, Tensors],
        round_: int,
    ) -> Fields:
        """Figures of the server step for rounds.jsonl, such as the aggregation error; called after it.

        Args:
            before: global model and server state that the round began with (their tensors may have been reused where
                `server_step` reuses them).
            after: what `server_step` gave.
        """
        return {}

    def exported(self, parameters: Tensors, state: Tensors) -> Tensors:
        """The global model in the adapter's terms (parameters and deltas): what the run's adapter is written from."""
        return self.evaluated(parameters, state)
