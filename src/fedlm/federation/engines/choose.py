"""Which engine carries a run's messages: the one place that knows them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlm.errors import RunError, nearest
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
    data: FederatedData,
    run_dir: Path,
    *,
    most: int,
    base: Path = Path(),
    observe: Observe | None = None,
) -> Engine:
    """The engine of this choice. It starts at its first exchange, and raises then what is wrong with its machines.

    Args:
        most: silos that are asked at once; there are never more workers.
        base: folder that relative paths of the recipe start from.
    """
    if choice.network is not None:
        raise RunError("this fedlm cannot run over a network", where=str(choice.network))
    if choice.engine == "ray":
        from fedlm.federation.engines.ray.engine import RayEngine

        return RayEngine(recipe, data, run_dir, address=choice.address, most=most, observe=observe, base=base)
    from fedlm.federation.engines.local import LocalEngine, resolve_workers

    workers = resolve_workers(recipe.federation, most, recipe.model.device)
    return LocalEngine(recipe, data, run_dir, workers=workers, observe=observe, base=base)
