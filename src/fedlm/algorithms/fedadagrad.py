"""FedAdagrad: FedAdam whose v never forgets."""

from __future__ import annotations

from torch import Tensor

from fedlm.algorithms.fedadam import FedAdam


class FedAdagrad(FedAdam):
    """v <- v + Delta^2 (Reddi et al., ICLR 2021, Algorithm 2); beta2 plays no part.

    The paper's algorithm keeps beta1 here too; its experiments set it to 0 (`server_momentum: 0`), the usual Adagrad.
    """

    adapter_server_lr = 3e-2
    """Larger than FedAdam's, since v adds up what FedAdam's averages."""

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        return v.addcmul_(delta, delta)
