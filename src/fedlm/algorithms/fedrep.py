"""FedRep: a representation that all silos share, a head that each keeps to itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from fedlm.algorithms.base import LocalRule, Outcome, Place, Session
from fedlm.algorithms.fedavg import FedAvg
from fedlm.errors import RecipeError, TrainingError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec
from fedlm.training.batches import steps_per_round

HEAD = "head/"
"""Prefix of the personal part's names in the silo's state."""


class FedRep(FedAvg):
    """Shared phi, personal h_i: in each round first h_i is trained at the phi received, then phi at the new h_i
    (Collins et al., ICML 2021, algorithm 1). The server averages phi and never sees h_i.

    The paper's head is a classifier on top. A language model's adapter has none; the recipe's `personal_part` says
    what is personal here: the adapter of the last n blocks, or 'lora_B' or 'lora_A' of every layer. The first
    `head_share` of a round's steps train h_i, the rest phi, so that a round costs what FedAvg's does; gradients are
    clipped together.

    h_i starts at the adapter's shared first values. Silos are measured with phi and their own h_i; the adapter that a
    run leaves has phi and h at its first values (which for the last n blocks and for lora_B adds nothing there).
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        values = first()
        own = personal_names(values, self.spec)
        return {name: value for name, value in values.items() if name not in own}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return HeadThenBody(received, silo_state, place, self.spec)

    def measured(self, received: Tensors, silo_state: Tensors, place: Place) -> Tensors:
        return received | heads(silo_state)


class HeadThenBody(LocalRule):
    """FedRep in the silo. Its state is h_i."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec, self.head = spec, heads(silo_state)
        self.head_steps = self.steps = 0

    def start(self) -> Tensors:
        return self.received | self.head

    def run(self, session: Session) -> Outcome:
        if not self.head:  # the first values, which nobody sends
            values = session.put(self.received)
            self.head = {
                name: value.detach().to("cpu", torch.float32, copy=True)
                for name, value in values.items()
                if name not in self.received
            }
        steps = steps_per_round(session.recipe.training, len(session.tokens))
        if steps < 2:  # the recipe tells of `steps` itself
            raise TrainingError(
                "fedrep needs at least 2 steps a round, one for each part, and this silo's rows make 1",
                where="training.epochs",
                fix="raise it, or lower training.batch_size",
            )
        self.head_steps = min(max(1, round(self.spec.head_share * steps)), steps - 1)
        return super().run(session)

    def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        head_turn = self.steps < self.head_steps
        for name, w in parameters.items():
            if (name in self.head) is not head_turn:
                w.grad = None  # an optimiser leaves a parameter without gradient as it is
        self.steps += 1

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update = {name: trained[name] - phi for name, phi in self.received.items()}
        return update, {HEAD + name: trained[name] for name in self.head}


def heads(silo_state: Tensors) -> Tensors:
    """h_i; empty where the silo has none yet."""
    return {name.removeprefix(HEAD): value for name, value in silo_state.items() if name.startswith(HEAD)}


def personal_names(names: Iterable[str], spec: AlgorithmSpec) -> set[str]:
    """Which of an adapter's parameters are personal.

    Raises:
        RecipeError: all or none.
    """
    names, part = list(names), spec.personal_part
    if isinstance(part, str):
        own = {name for name in names if f".{part}." in name}
    else:
        blocks = {name: int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
        last = max(blocks.values(), default=0)
        own = {name for name, block in blocks.items() if block > last - part}
    if not own or len(own) == len(names):
        raise RecipeError(
            f"the personal part of the adapter is {'everything' if own else 'nothing'}, so there is nothing to "
            f"{'share' if own else 'keep'}",
            where="federation.algorithm.personal_part",
            fix="choose fewer blocks" if own else "choose a part that this adapter has",
        )
    return own
