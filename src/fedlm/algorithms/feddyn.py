"""FedDyn: every silo's objective is bent until its optimum is that of the federation."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors

DUAL = "dual/"
"""Prefix of g_i's names in the silo's state."""


class FedDyn(FedAvg):
    """Each silo minimises F_i(w) - <g_i, w> + alpha/2 |w - theta|^2 (Acar et al., ICLR 2021, algorithm 1).

        g_i <- g_i - alpha (theta_i - theta)     in the silo, from g_i = 0
        h <- h - alpha (|S|/N) mean(u_i)         at the server: h is the mean of all g_i
        theta <- theta + mean(u_i) - h / alpha

    Where all silos stay at theta, g_i is F_i's gradient there and h = 0: a stationary point of the mean loss, however
    different the silos are and however many local steps they take. alpha is the recipe's `dyn_alpha`.

    The paper solves each local problem to its end. -h / alpha adds up all mean updates so far, so that local training
    that stays far from its end (few steps, alpha small against the gradients) makes theta overshoot: raise alpha then.
    Both terms are added to the gradient after clipping, which is there for the data's gradient. Silos count equally,
    as in the paper, and nothing travels beside the model: g_i stays in the silo, h at the server.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return DynamicallyRegularised(received, silo_state, place, self.spec.dyn_alpha)

    def init_state(self, parameters: Tensors) -> Tensors:
        return {f"h/{name}": torch.zeros_like(theta, dtype=torch.float32) for name, theta in parameters.items()}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        alpha, stepped, following = self.spec.dyn_alpha, dict(parameters), dict(state)
        for name, mean in accumulator.mean():
            share = accumulator.counted(name) / step.silos_total  # |S| / N
            h = following[f"h/{name}"] = torch.add(state[f"h/{name}"], mean, alpha=-alpha * share)
            stepped[name] = parameters[name] + mean - h / alpha
        return stepped, following


class DynamicallyRegularised(LocalRule):
    """FedDyn in the silo. Its state is g_i; a silo without one starts from g_i = 0."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place, alpha: float) -> None:
        super().__init__(received, silo_state, place)
        self.alpha = alpha
        self.g = {name: silo_state.get(DUAL + name, torch.zeros_like(theta)) for name, theta in received.items()}
        self.pull: Tensors = {}
        """g_i + alpha theta: the part of the two terms' gradient that does not depend on w, negated."""

    @torch.no_grad()
    def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        for name, w in parameters.items():
            if name not in self.pull:  # once to the parameters' device
                self.pull[name] = torch.add(self.g[name], self.received[name], alpha=self.alpha).to(w.device)
            if w.grad is None:
                w.grad = torch.zeros_like(w)
            w.grad.add_(w, alpha=self.alpha).sub_(self.pull[name])

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, _ = super().finish(trained)
        moved = {name: torch.sub(self.g[name], u, alpha=self.alpha) for name, u in update.items()}
        return update, {DUAL + name: g for name, g in (self.g | moved).items()}
