"""The `Algorithm` waist: what is trained and exchanged, the local correction, streaming accumulation, the server step.

Symbols: theta is the round's global model, theta_i a silo's model after local training, u_i = theta_i - theta its
update, p_i its weight. All arithmetic on updates is fp32 whatever dtype arrives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fedlm.errors import RunError, UpdateRefused
from fedlm.messages import Fields, Tensors
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AlgorithmSpec

BLOCK = 1 << 17
"""Elements widened to fp32 at a time when an update arrives in another dtype: 512 KiB, which stays in cache."""


def weight_of(spec: AlgorithmSpec, fields: Fields) -> float:
    """A silo's weight in the mean, read from its reply: the training examples it holds (McMahan's n_k), their target
    tokens, or 1 for everybody. How much of them a round trains on does not matter.

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
    """

    total: Tensors = field(default_factory=dict)
    weight: float = 0.0
    count: int = 0

    def add(self, update: Mapping[str, Tensor], weight: float) -> None:
        """total += weight * update, in fp32. Silos must be folded in canonical order: float sums depend on it.

        Raises:
            UpdateRefused: the names are not those of the updates before.
        """
        if not self.total:
            self._lay_out(update)
        if update.keys() != self.total.keys():
            raise UpdateRefused("the update's tensors are not those of the other silos")
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

    def mean(self) -> Iterator[tuple[str, Tensor]]:
        """The weighted mean, one tensor at a time, divided in place: read it once.

        Raises:
            RunError: nothing was folded.
        """
        if not self.count:
            raise RunError("no silo's update was accepted, so there is no mean")
        for name, tensor in self.total.items():
            yield name, tensor.div_(self.weight)

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


class LocalRule:
    """One silo's side of one round. The base class is plain local training (FedAvg)."""

    def __init__(self, received: Tensors, silo_state: Tensors) -> None:
        self.received, self.silo_state = received, silo_state

    def start(self) -> Tensors:
        """Parameters (by name, fp32) that local training starts from."""
        return self.received

    def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Change `.grad` in place; called once after clipping and before every optimiser step."""

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        """The update that leaves the silo and the state that stays in it, from the trained parameters (fp32)."""
        start = self.start()
        return {name: value - start[name] for name, value in trained.items()}, {}


class Algorithm:
    """How updates become one model. The base class is FedAvg's shape; subclasses override what differs."""

    default_server_lr = 1.0

    def __init__(self, spec: AlgorithmSpec) -> None:
        self.spec = spec

    @property
    def server_lr(self) -> float:
        """eta of the server step: the recipe's, or the algorithm's own default."""
        return self.default_server_lr if self.spec.server_lr is None else self.spec.server_lr

    # at both ends
    def trainable(self, name: str) -> bool:  # noqa: ARG002
        """Whether the parameter of this name is trained and exchanged."""
        return True

    # in the silo
    def local(self, received: Tensors, silo_state: Tensors) -> LocalRule:
        return LocalRule(received, silo_state)

    # at the coordinator
    def init_state(self, parameters: Tensors) -> Tensors:  # noqa: ARG002
        """The server's own tensors at round 0 (momentum, variates ...), checkpointed with the model."""
        return {}

    def broadcast(self, parameters: Tensors, state: Tensors) -> Tensors:  # noqa: ARG002
        """What travels to the silos this round."""
        return parameters

    def expected_update(self, parameters: Tensors) -> dict[str, torch.Size]:
        """Names and shapes that an update must have; anything else is refused."""
        return {name: value.shape for name, value in parameters.items()}

    def accumulator(self) -> Accumulator:
        return Accumulator()

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float) -> None:
        accumulator.add(update, weight)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, *, silos_total: int
    ) -> tuple[Tensors, Tensors]:
        """The next global model and server state. May reuse the accumulator's and the state's memory."""
        raise NotImplementedError
