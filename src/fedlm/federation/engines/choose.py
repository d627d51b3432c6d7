"""Which engine carries a run's messages: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlm.errors import RunError, nearest
from fedlm.federation.rundir import RunDir
from fedlm.federation.sampling import invited
from fedlm.messages import Engine, Observe
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.data.federated import FederatedData

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Choice:
    """What the user chose.

    Attributes:
        engine: "local" for this machine's processes, "ray" for a Ray cluster.
        address: with "ray", a running cluster; None starts Ray on this machine.
        network: the coordinator's kit; then the silos are organisations, and `engine` does not apply.

    Raises:
        RunError: there is no such engine, or the options contradict each other.
    """

    engine: str = "local"
    address: str | None = None
    network: Path | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise RunError(f"unknown engine '{self.engine}', {nearest(self.engine, ENGINES)}", where="--engine")
        if self.address is not None and self.engine != "ray":
            raise RunError(
                "an address is that of a Ray cluster, and the engine is another",
                where="--address",
                fix="add --engine ray, or drop --address",
            )
        if self.network is not None and self.engine != "local":
            raise RunError(
                "silos over a network and simulated silos over Ray exclude each other",
                where="--engine",
                fix="drop --engine or --network",
            )


def make_engine(
    choice: Choice,
    recipe: Recipe,
    data: FederatedData | None,
    directory: RunDir,
    *,
    silos: Sequence[str] | None = None,
    base: Path = Path(),
    observe: Observe | None = None,
) -> Engine:
    """The engine of this choice. Those that simulate start at their first exchange, and raise then what is wrong.

    Args:
        data: all silos' rows; None over a network, where each silo has its own.
        silos: names that take part; all by default.
        base: folder that relative paths of the recipe start from.

    Raises:
        NetworkError: the network's relay does not answer, or refuses.
    """
    if choice.network is not None:
        from fedlm.federation.engines.flare.engine import FlareEngine

        return FlareEngine(recipe, choice.network, directory.run, directory.path, observe=observe)
    assert data is not None
    most = invited(recipe.federation, len(data.names if silos is None else silos))
    if choice.engine == "ray":
        from fedlm.federation.engines.ray.engine import RayEngine

        return RayEngine(recipe, data, directory.path, address=choice.address, most=most, observe=observe, base=base)
    from fedlm.federation.engines.local import LocalEngine, resolve_workers

    workers = resolve_workers(recipe.federation, most, recipe.model.device)
    return LocalEngine(recipe, data, directory.path, workers=workers, observe=observe, base=base)
