"""SCAFFOLD: control variates that take the silos' differences out of their local steps."""

from __future__ import annotations

import torch

from fedlm.algorithms.base import Accumulator, LocalRule, Place, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors

VARIATE = "variate/"
"""Prefix of a variate's name: c on the way down and at the server, c_i+ - c_i on the way up, c_i in the silo."""


class Scaffold(FedAvg):
    """Local steps along g - c_i + c: c_i estimates the silo's gradient, c their mean (Karimireddy et al., ICML 2020).

    The paper's Option II takes c_i+ = c_i - c + (theta - y_i)/(K eta), a gradient only for plain SGD at a constant
    rate. Here c_i+ is the mean over the K local steps of the uncorrected (clipped) gradient: the same number for
    plain SGD, and still a gradient for momentum, AdamW and schedules. The server moves theta by eta * mean(u_i) and c
    by (|S|/N) mean(c_i+ - c_i), both unweighted, since c must stay the plain mean of the c_i.

    Variates are fp32 everywhere; they double the bytes each way.
    """

    def local(self, received: Tensors, silo_state: Tensors, place: Place) -> LocalRule:
        return ControlVariates(received, silo_state, place)

    def init_state(self, parameters: Tensors) -> Tensors:
        return {VARIATE + name: torch.zeros_like(theta, dtype=torch.float32) for name, theta in parameters.items()}

    def broadcast(self, parameters: Tensors, state: Tensors, round_: int) -> Tensors:
        return parameters | state

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        shapes = super().expected_update(parameters, place)
        return shapes | {VARIATE + name: shape for name, shape in shapes.items()}

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        stepped, variates = dict(parameters), dict(state)
        for name, mean in accumulator.mean():
            if name.startswith(VARIATE):
                share = accumulator.counted(name) / step.silos_total  # |S| / N
                variates[name] = torch.add(state[name], mean, alpha=share)
            else:
                stepped[name] = torch.add(parameters[name], mean, alpha=self.server_lr)
        return stepped, variates


class ControlVariates(LocalRule):
    """SCAFFOLD in the silo. Its state is c_i, under the variates' names; a silo without one starts from c_i = 0."""

    def __init__(self, received: Tensors, silo_state: Tensors, place: Place) -> None:
        theta = {name: value for name, value in received.items() if not name.startswith(VARIATE)}
        super().__init__(theta, silo_state, place)
        self.c = {name: received[VARIATE + name] for name in theta}
        self.c_i = {name: silo_state.get(VARIATE + name, torch.zeros_like(c)) for name, c in self.c.items()}
        self.correction: Tensors = {}
        self.gradient_sum: Tensors = {}
        self.steps = 0

    @torch.no_grad()
    def correct(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        for name, w in parameters.items():
            if w.grad is None:
                w.grad = torch.zeros_like(w)
            if self.steps == 0:
                self.correction[name] = (self.c[name] - self.c_i[name]).to(w.device)
                self.gradient_sum[name] = torch.zeros_like(w, dtype=torch.float32)
            self.gradient_sum[name].add_(w.grad)
            w.grad.add_(self.correction[name])
        self.steps += 1

    def finish(self, trained: Tensors) -> tuple[Tensors, Tensors]:
        update, _ = super().finish(trained)
        state: Tensors = {}
        for name, c_i in self.c_i.items():
            # A round without a step says nothing new about the silo's gradient, nor does any of what is not trained.
            renewed = self.gradient_sum[name].div(self.steps).cpu() if name in self.gradient_sum else c_i
            state[VARIATE + name] = renewed
            if name in trained:
                update[VARIATE + name] = renewed - c_i
        return update, state
