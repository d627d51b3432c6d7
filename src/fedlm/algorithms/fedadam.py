"""FedAdam, and the server step it shares with the other adaptive rules."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Step
from fedlm.algorithms.fedavg import FedAvg
from fedlm.errors import RecipeError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec


class FedAdam(FedAvg):
    """Adam at the server, on Delta = mean(u_i) (Reddi et al., ICLR 2021, Algorithm 2).

        m <- beta1 m + (1 - beta1) Delta
        v <- beta2 v + (1 - beta2) Delta^2          (FedYogi and FedAdagrad differ in this line alone)
        theta <- theta + eta m / (sqrt(v) + tau)

    As in the paper there is no bias correction: m starts at 0 and v at tau^2, which damps the first rounds.
    beta1 is the recipe's `server_momentum`.
    """

    default_server_lr = 1e-3
    adapter_server_lr = 5e-3
    """The default for adapters, whose values a round moves further than full weights. With tau = 1e-3, of five rounds
    on a tiny trained model: 1e-3 hardly moves, 1e-2 oversteps. It goes with local rates around 1e-3 to 1e-2."""

    def __init__(self, spec: AlgorithmSpec, adapter: AdapterSpec) -> None:
        super().__init__(spec, adapter)
        if adapter.kind != "full":
            self.default_server_lr = self.adapter_server_lr
        for field, beta in (("server_momentum", spec.server_momentum), ("beta2", spec.beta2)):
            if beta == 1.0:
                raise RecipeError(
                    f"{field} = 1 never lets a new update in",
                    where=f"federation.algorithm.{field}",
                    fix="choose a value below 1, such as 0.9",
                )

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        """The next v; may change v in place."""
        beta2 = self.spec.beta2
        return v.mul_(beta2).addcmul_(delta, delta, value=1 - beta2)

    def init_state(self, parameters: Tensors) -> Tensors:
        state: Tensors = {}
        for name, theta in parameters.items():
            state[f"m/{name}"] = torch.zeros_like(theta, dtype=torch.float32)
            state[f"v/{name}"] = torch.full_like(theta, self.spec.tau**2, dtype=torch.float32)
        return state

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        beta1, tau = self.spec.server_momentum, self.spec.tau
        stepped = dict(parameters)  # what no silo trained stays
        for name, delta in accumulator.mean():
            m = state[f"m/{name}"].mul_(beta1).add_(delta, alpha=1 - beta1)
            v = state[f"v/{name}"] = self.second_moment(state[f"v/{name}"], delta)
            stepped[name] = torch.addcdiv(parameters[name], m, v.sqrt().add_(tau), value=self.server_lr)
        return stepped, state
