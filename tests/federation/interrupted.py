"""Runs that are interrupted in their second round, here and over a network, and what a run ended with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fedlm.data.federated import load_data
from fedlm.federation.api import about, new_run
from fedlm.federation.coordinator import run
from fedlm.federation.engines.flare.engine import FlareEngine
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Engine, Failure, Observe, Reply, Request, Stop, Tensors
from fedlm.recipe.schema import Recipe
from tests.federation.flare.loop import Loop


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


class Interrupted:
    """An engine during whose use Ctrl-C is pressed, when silos are to train in round 1."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def silos(self) -> Sequence[str]:
        return self.engine.silos()

    def close(self) -> None:
        self.engine.close()

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        asked = list(requests)
        if any(request.verb == "train" and request.round == 1 for request in asked):
            raise KeyboardInterrupt
        yield from self.engine.exchange(asked, deadline, stop)


def ended(folder: Path) -> tuple[Tensors, list[Any]]:
    checkpoint = RunDir.open(folder, write=False).load_checkpoint()
    assert checkpoint is not None
    return checkpoint.parameters, [(line["loss"], line["validation"]) for line in lines(folder)]


def over_a_network(recipe: Recipe, base: Path, there: Path, network: Path) -> None:
    """A run through the relays of a network in this process, interrupted in its second round and resumed."""
    data = load_data(recipe, base)
    (there / "silos").mkdir(parents=True)
    bench = Workbench(recipe, data)

    def handle(request: Request, tell: Observe, should_stop: object) -> Reply | Failure:  # noqa: ARG001
        return Silo(request.silo, bench, there / "silos").handle(request)

    loop = Loop(network, tuple(data.names), dict.fromkeys(data.names, handle))
    with closing(new_run(recipe, there, base=base, force=True, **about(data))) as directory:
        with closing(FlareEngine(recipe, loop.kit.path, "run", there)) as engine:
            assert run(recipe, Interrupted(engine), directory).status == "interrupted"
        bench = Workbench(recipe, data)
        with closing(FlareEngine(recipe, loop.kit.path, "run", there)) as engine:
            assert run(recipe, engine, directory, resume=True).status == "finished"
