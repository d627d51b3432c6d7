"""The `Algorithm` waist: what is trained and exchanged, the local correction, streaming accumulation, the server step.

Symbols: theta is the round's global model, theta_i a silo's model after local training, u_i = theta_i - theta its
update, p_i its weight. All arithmetic on updates is fp32 whatever dtype arrives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec


@dataclass
class Accumulator:
    """Weighted sum of the updates folded so far: one fp32 copy of an update, however many silos there are."""

    total: Tensors = field(default_factory=dict)
    weight: float = 0.0
    count: int = 0

    def add(self, update: Tensors, weight: float) -> None:
        """total += weight * update, in fp32. Silos must be folded in canonical order: float sums depend on it."""
        for name, tensor in update.items():
            if name in self.total:
                self.total[name].add_(tensor.to(torch.float32), alpha=weight)
            else:
                self.total[name] = tensor.to(torch.float32) * weight
        self.weight += weight
        self.count += 1

    def mean(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weighted mean, one tensor at a time, divided in place."""
        for name, tensor in self.total.items():
            yield name, tensor.div_(self.weight)


class LocalRule:
    """One silo's side of one round. The base class is plain local training (FedAvg)."""

    def __init__(self, received: Tensors, silo_state: Tensors) -> None:
        self.received, self.silo_state = received, silo_state

    def start(self) -> Tensors:
        """Parameters (by name, fp32) that local training starts from."""
        return self.received

    def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        """Change `.grad` in place; called after clipping and before every optimiser step."""

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        """The update that leaves the silo and the state that stays in it, from the trained parameters (fp32)."""
        start = self.start()
        return {name: value - start[name] for name, value in trained.items()}, {}


class Algorithm:
    """How updates become one model. The base class is FedAvg's shape; subclasses override what differs."""

    def __init__(self, spec: AlgorithmSpec) -> None:
        self.spec = spec

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

    def fold(self, accumulator: Accumulator, update: Tensors, weight: float) -> None:
        accumulator.add(update, weight)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, *, silos_total: int
    ) -> tuple[Tensors, Tensors]:
        """The next global model and server state. May reuse the accumulator's and the state's memory."""
        raise NotImplementedError
