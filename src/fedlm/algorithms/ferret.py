"""Ferret: first-order training whose updates travel as coordinates on shared random bases."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedlm.algorithms.base import Accumulator, Algorithm, LocalRule, Outcome, Place, Session, Step
from fedlm.messages import Tensors
from fedlm.models.directions import COORDINATES, project
from fedlm.recipe.schema import AlgorithmSpec


class Ferret(Algorithm):
    """Delta~ = 1 / (rho K_l) sum_k v_k v_k' Delta, block by block (Shu et al., ICML 2025).

    A silo trains all weights as in FedAvg and sends the K coordinates of its Delta = w_i - w on random bases v_k; the
    server averages them (p_i) and everybody adds the reconstruction. Delta~ is unbiased whatever K, with
    E |Delta~ - Delta|^2 = (d_l / K_l) |Delta|^2 up to a factor 1 + O(1 / d_l): d / K times more noise than signal, so
    that learning rates (or `server_lr`) want to be about K / d of FedAvg's.

    Blocks are equal parts of the weights laid end to end, K_l (`per_block`) bases in each; time is that of K_l sweeps
    over the weights, and the error depends on d / K alone. Entries of v_k are uniform in +-1/sqrt(d_l), so that
    rho_l = 1 / (3 d_l); the paper's standard normal, cut off there, has this density up to a factor 1 + O(1 / d_l).

    Two things differ from the paper. All silos share the bases of a round, so coordinates are averaged and K of them
    come back, not K per silo; the noise of different silos then does not average out. And K_l is the same for all
    blocks (the paper gives blocks with a longer Delta more), since silos that share bases must agree.

    The global model is the list of all rounds' coordinates; silos rebuild the weights from the base, or from the
    weights of the round before, with the same bits. The way down grows by 4 K bytes a round.
    """

    def initial(self, first: Callable[[], Tensors]) -> Tensors:
        per_block = self.spec.per_block
        return {COORDINATES: torch.zeros(0, self.spec.seeds // per_block, per_block)}

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return Projected(received, silo_state, place, self.spec)

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {COORDINATES: parameters[COORDINATES].shape[1:]}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        ((_, mean),) = accumulator.mean()
        return {COORDINATES: torch.cat([parameters[COORDINATES], mean[None] * self.server_lr])}, state


class Projected(LocalRule):
    """Ferret in the silo."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, spec: AlgorithmSpec) -> None:
        super().__init__(received, silo_state, place)
        self.spec, self._start = spec, received

    def start(self) -> Tensors:
        """The description that was received; once the round runs, the weights."""
        return self._start

    def run(self, session: Session) -> Outcome:
        weights = session.put(self.received)
        self._start = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}
        result, trained = session.train(self)
        delta = {name: value.sub_(self._start[name]) for name, value in trained.items()}
        blocks, per_block = self.received[COORDINATES].shape[1:]
        number = len(self.received[COORDINATES])
        return Outcome(result, {COORDINATES: project(delta, self.place.seed, number, blocks, per_block)}, {})
