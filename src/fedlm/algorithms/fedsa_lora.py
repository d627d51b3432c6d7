"""FedSA-LoRA: silos share A and keep B."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedlm.algorithms.base import LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedit import FedIT
from fedlm.messages import Tensors


class FedSALoRA(FedIT):
    """A = sum p_i A_i is shared; B_i stays in its silo (Guo et al., ICLR 2025).

    A is found to learn what silos have in common and B what is their own. Half the bytes of FedIT. Each silo's model is
    A with its own B_i, and is measured so; the federation has no common B, so a silo that never trained has B = 0, the
    base's behaviour, and so has the adapter that a run exports.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        return {name: value for name, value in first().items() if ".lora_A." in name}

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in parameters.items()}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return OwnB(received, silo_state, place)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return received | silo_state


class OwnB(LocalRule):
    """FedSA-LoRA in the silo. Its state is B_i."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place) -> None:
        super().__init__(received, silo_state, place)
        self.b = dict(silo_state)

    def start(self) -> Tensors:
        return self.received | self.b

    def run(self, session: Session) -> Outcome:
        if not self.b:  # the first round of this silo: only the model knows B's shape
            parameters = session.put(self.received)
            self.b = {name: torch.zeros(p.shape) for name, p in parameters.items() if ".lora_B." in name}
        return super().run(session)

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update = {name: trained[name] - value for name, value in self.received.items()}
        return update, {name: trained[name] for name in self.b}
