"""FedYogi: FedAdam whose v changes by a bounded amount."""

from __future__ import annotations

import torch
from torch import Tensor

from fedlm.algorithms.fedadam import FedAdam


class FedYogi(FedAdam):
    """v <- v - (1 - beta2) Delta^2 sign(v - Delta^2) (Reddi et al., ICLR 2021, Algorithm 2).

    The rule is Yogi's (Zaheer et al., NeurIPS 2018): v moves towards Delta^2 by (1 - beta2) Delta^2, so a burst of
    small updates cannot shrink it quickly.
    """

    def second_moment(self, v: Tensor, delta: Tensor) -> Tensor:
        squared = delta.square()
        return v.addcmul_(squared, torch.sign(v - squared), value=self.spec.beta2 - 1)
