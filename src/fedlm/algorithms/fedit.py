"""FedIT: the weighted means of the silos' A and of their B."""

from __future__ import annotations

from fedlm.algorithms.fedavg import FedAvg
from fedlm.algorithms.lora import LoRAMethod


class FedIT(LoRAMethod, FedAvg):
    """A = sum p_i A_i, B = sum p_i B_i (Zhang et al., ICASSP 2024): FedAvg on LoRA's factors, with its error measured.

    The silos' mean change is sum p_i B_i A_i, and mean(B_i) mean(A_i) differs from it by the covariance of the silos'
    factors: 0 for one silo, growing with the local steps and with what sets the silos apart.
    """
