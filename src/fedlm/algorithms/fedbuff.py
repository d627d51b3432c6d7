"""FedBuff, and the staleness weights it shares with FedAsync."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedlm.algorithms.base import Accumulator, Place
from fedlm.algorithms.fedavg import FedAvg
from fedlm.messages import Tensors
from fedlm.recipe.schema import AlgorithmSpec


def staleness_weight(spec: AlgorithmSpec, tau: int) -> float:
    """s(tau): what an update that is tau server steps late counts for beside one that is not (Xie et al., 2019, 5.2).

    constant: 1. polynomial: (tau + 1)^-a, with a = 0.5 by default, which is FedBuff's 1 / sqrt(1 + tau).
    hinge: 1 up to tau = b, then 1 / (a (tau - b) + 1), with a = 10 by default.
    """
    match spec.staleness:
        case "constant":
            return 1.0
        case "polynomial":
            return float((tau + 1.0) ** -(0.5 if spec.staleness_a is None else spec.staleness_a))
        case "hinge":
            a = 10.0 if spec.staleness_a is None else spec.staleness_a
            return 1.0 if tau <= spec.staleness_b else 1.0 / (a * (tau - spec.staleness_b) + 1.0)


class FedBuff(FedAvg):
    """A server step for every K updates, whoever sent them (Nguyen et al., AISTATS 2022, Algorithm 1).

        theta <- theta + eta sum_k p_k s(tau_k) u_k          over the K updates in the buffer

    u_k = theta_k - theta_(t - tau_k) is what a silo learnt from the model of tau_k server steps ago. s does not enter
    the weights p_k, so a buffer of stale updates makes a smaller step. K is the recipe's `buffer`, eta its `server_lr`.

    The paper's p_k is 1/K, the recipe's `weights: equal`; by default p_k is the silo's share of the buffer's examples,
    as in FedAvg. A silo is in a buffer as often as it answers: fast ones count for more, which no weight here undoes.
    """

    def counted(
        self, update: Mapping[str, Tensor], place: Place, start: Tensors, theta: Tensors
    ) -> Mapping[str, Tensor]:
        """The difference that enters the mean.

        Args:
            update: theta_k - start.
            start: the model that the silo trained from.
            theta: the global model of this moment.
        """
        return update

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        weights = accumulator.weight + weight
        accumulator.add(update, weight * staleness_weight(self.spec, place.staleness))
        accumulator.weight = weights
