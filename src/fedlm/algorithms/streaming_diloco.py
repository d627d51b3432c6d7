"""Streaming DiLoCo: the model is synchronised a fragment at a time, while silos go on training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn import Parameter

from fedlm.algorithms.base import LocalRule, Place
from fedlm.algorithms.diloco import DiLoCo
from fedlm.errors import RecipeError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec
from fedlm.training.footprint import block_of

ROUND = "streaming/round"
"""In a silo's state: the round that it is of."""


class StreamingDiLoCo(DiLoCo):
    """DiLoCo whose model is cut into P fragments of layers, synchronised in turn (Douillard et al., 2025).

    A round is H / P inner steps; at its end one fragment's pseudo-gradient travels, so that each is synchronised every
    H steps and the bytes of a moment are those of a fragment. Silos go on with parameters of their own: a fragment p
    that has come back is mixed in tau inner steps into the next round,

        theta_i,p <- alpha theta_i,p + (1 - alpha) theta_p

    with theta_p the outer optimiser's, which moves (with a momentum per tensor) only when p is synchronised. Its next
    pseudo-gradient is theta_p - theta_i,p. P is the recipe's `fragments`, H / P its `training.steps`, tau its
    `overlap`, alpha its `mixing`; P = 1, tau = 0 and alpha = 0 are DiLoCo, and alpha = 0 is its default here.

    The global model is the outer optimiser's, whose fragments are of different rounds. Layers are dealt strided (layer
    l to fragment l mod P, the paper's choice) or sequentially; the embeddings belong to the first fragment, the last
    norm and the head to the last. The paper quantises pseudo-gradients to 4-bit floats: here guards do, to 4-bit
    integers. `overlap` says what is computed, not when bytes move: rounds wait for the silos' updates.
    """

    @property
    def cycle(self) -> int:
        return self.spec.fragments

    def init_state(self, parameters: Tensors) -> Tensors:
        fragments_of(parameters, self.spec)  # a model that cannot be cut so is told before anything is trained
        return super().init_state(parameters)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        due = fragment_in(place.round, parameters, self.spec)
        return {name: shape for name, shape in super().expected_update(parameters, place).items() if name in due}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Streaming(received, silo_state, place, self.spec)


class Streaming(LocalRule):
    """The silo's side. Its state is its own parameters, under their names, and the round they are of.

    The fragments that were synchronised since then are due to be mixed in; usually that is one. A silo without a state
    starts from the global model.
    """

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec, self.due = spec, set[str]()
        own = dict(silo_state)
        if own:
            since = int(own.pop(ROUND))
            for round_ in range(max(since, place.round - spec.fragments), place.round):
                self.due |= fragment_in(round_, received, spec)
        self.own = own or received

    def start(self) -> Tensors:
        if self.spec.overlap:
            return self.own
        return {name: self._mixed(name, value) if name in self.due else value for name, value in self.own.items()}

    @torch.no_grad()
    def before(self, step: int, parameters: dict[str, Parameter]) -> None:
        if step == self.spec.overlap > 0:
            for name in self.due:
                parameters[name].copy_(self._mixed(name, parameters[name]))

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        sent = fragment_in(self.place.round, self.received, self.spec)
        update = {name: trained[name] - self.received[name] for name in trained if name in sent}
        return update, {**trained, ROUND: torch.tensor(self.place.round)}

    def _mixed(self, name: str, own: torch.Tensor) -> torch.Tensor:
        return torch.lerp(self.received[name].to(own), own.detach(), self.spec.mixing)


def fragments_of(names: Iterable[str], spec: AlgorithmSpec) -> dict[str, int]:
    """By tensor, the fragment it belongs to.

    Raises:
        RecipeError: there are fewer layers than fragments.
    """
    names, count = list(names), spec.fragments
    blocks = sorted({block for name in names if (block := block_of(name)) is not None})
    if len(blocks) < count and count > 1:
        raise RecipeError(
            f"{count} fragments cannot be made of {len(blocks)} layers",
            where="federation.algorithm.fragments",
            fix=f"give at most {max(len(blocks), 1)}",
        )
    place = {block: i for i, block in enumerate(blocks)}
    found = {}
    for name in names:
        block = block_of(name)
        if block is None:
            found[name] = 0 if "embed" in name else count - 1
        elif spec.pattern == "strided":
            found[name] = place[block] % count
        else:
            found[name] = place[block] * count // len(blocks)
    return found


def fragment_in(round_: int, names: Iterable[str], spec: AlgorithmSpec) -> set[str]:
    """The tensors whose pseudo-gradient travels at the end of this round."""
    return {name for name, fragment in fragments_of(names, spec).items() if fragment == round_ % spec.fragments}
