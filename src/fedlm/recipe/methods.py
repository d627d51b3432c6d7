"""What a recipe must know of each algorithm, declared as data low in the import order."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """Facts that decide which combinations a recipe may ask for."""

    paper: str
    linear: bool
    """The new model is a function of the weighted sum of updates alone (so it can be masked or streamed)."""
    silo_state: bool = False
    """The silo keeps private tensors between rounds."""
    equal_weights: bool = False
    """Every silo counts the same: the recipe's `weights` can only be 'equal'."""


ALGORITHMS: dict[str, Method] = {
    "fedavg": Method("McMahan et al., AISTATS 2017", linear=True),
    "fedprox": Method("Li et al., MLSys 2020", linear=True),
    "scaffold": Method("Karimireddy et al., ICML 2020", linear=True, silo_state=True, equal_weights=True),
    "fedavgm": Method("Hsu et al., 2019", linear=True),
    "fedadam": Method("Reddi et al., ICLR 2021", linear=True),
    "fedyogi": Method("Reddi et al., ICLR 2021", linear=True),
    "fedadagrad": Method("Reddi et al., ICLR 2021", linear=True),
}
