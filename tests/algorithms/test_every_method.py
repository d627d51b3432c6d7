"""Every method there is, through real silos, with compressed updates wherever its facts allow that: simulated in one
go, or over a network, resumed, and sent only what has changed, it ends in the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlm.data.federated import load_data
from fedlm.federation.api import about, new_run
from fedlm.federation.coordinator import run
from fedlm.federation.engines.flare.engine import FlareEngine
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Engine, Failure, Observe, Reply, Request, Stop, Tensors
from fedlm.recipe.methods import ALGORITHMS, FACTORS
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.flare.loop import Loop

SILOS, THREE = ("site2", "site3"), ("site0", "site2", "site3")
SEEDS = ["federation.algorithm.seeds=8"]
OPTIONS = {
    "fedkseed": SEEDS,
    "ferret": SEEDS,
    "feedsign": ["training.lr=5e-4"],  # the schema's, so that none is given
    "feddyn": ["federation.algorithm.dyn_alpha=1.0"],
    "fedbpt": ["training.lr=5e-4", "federation.algorithm.population=4", "training.batch_size=2"],
    "fedbuff": ["federation.algorithm.buffer=3"],
    "streaming-diloco": [
        "federation.algorithm.fragments=2",
        "federation.algorithm.overlap=1",
        "federation.algorithm.mixing=0.5",
        "federation.downlink={send: changed}",
    ],
    "delayed-nesterov": ["federation.algorithm.buffer=2"],
    "fltrust": ["federation.algorithm.root=site3"],
}


def silos_of(name: str) -> tuple[str, ...]:
    """As many as the method needs."""
    withstands = ALGORITHMS[name].withstands
    return THREE if withstands is not None and withstands[1] > 2 else SILOS


def recipe_of(tiny: Tiny, name: str, *more: str) -> Recipe:
    """Unequal silos, three rounds, alpha != rank; AdamW's moments kept and updates compressed where they may be."""
    method = ALGORITHMS[name]
    changes = [f"federation.algorithm.name={name}", "federation.rounds=3", "training.steps=2"]
    kind = "lora" if "lora" in method.adapters else method.adapters[0]
    changes += [
        f"data.partition.max_silos={len(silos_of(name))}",
        "data.split.test=0",
        "evaluation={max_examples: 2, every: 2}",
        f"adapter={{kind: {kind}}}",
    ]
    if method.withstands is not None:
        changes.append("federation.algorithm.byzantine=0")
    if kind in FACTORS:
        changes += ["adapter.rank=2", "adapter.alpha=6"]
    if not method.asynchronous and "keep_optimizer" not in method.without:
        changes.append("training.keep_optimizer=true")
    if not method.no_guards:
        lossy = "{name: randk, density: 0.5}" if method.no_feedback else "{name: int4, error_feedback: true}"
        changes.append(f"guards=[{lossy}]")
    return tiny.recipe(*changes, *OPTIONS.get(name, []), *more)


class Network:
    """Both relays with their sockets and parts, for one run after another; its silos can start anew."""

    def __init__(self, folder: Path, silos: tuple[str, ...]) -> None:
        self.bench: Workbench
        self.states: Path
        self.loop = Loop(folder, silos, dict.fromkeys(silos, self.handle))

    def handle(self, request: Request, tell: Observe, should_stop: object) -> Reply | Failure:  # noqa: ARG002
        return Silo(request.silo, self.bench, self.states).handle(request)

    def open(self, recipe: Recipe, base: Path, folder: Path) -> FlareEngine:
        """An engine, to silos that remember what is on disk alone."""
        self.bench, self.states = Workbench(recipe, load_data(recipe, base)), folder / "silos"
        self.states.mkdir(exist_ok=True)
        return FlareEngine(recipe, self.loop.kit.path, folder.parent.name, folder)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Network]:
    """The network of these silos, the same one whenever it is asked for."""
    return cache(lambda silos: Network(tmp_path_factory.mktemp("network"), silos))


@pytest.fixture
def network(networks: Callable[[tuple[str, ...]], Network], name: str) -> Network:
    return networks(silos_of(name))


class Interrupted:
    """An engine during whose use Ctrl-C is pressed, when a silo is to train in this round."""

    def __init__(self, engine: Engine, before: int) -> None:
        self.engine, self.before = engine, before

    def silos(self) -> Sequence[str]:
        return self.engine.silos()

    def close(self) -> None:
        self.engine.close()

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        asked = list(requests)
        if any(request.verb == "train" and request.round == self.before for request in asked):
            raise KeyboardInterrupt
        yield from self.engine.exchange(asked, deadline, stop)


def ended(folder: Path, silos: tuple[str, ...]) -> tuple[dict[str, Tensors], list[list[Any]]]:
    """The last checkpoint, what silos keep of the last round, and what was measured."""
    directory = RunDir.open(folder, write=False)
    checkpoint = directory.load_checkpoint()
    assert checkpoint is not None
    tensors = {"model": checkpoint.parameters, "server": checkpoint.server_state}
    for silo in silos:
        for file in (folder / "silos" / silo).rglob("round-0002.safetensors"):
            tensors[silo] = load_file(file)
    figures = ("loss", "validation", "replied", "failures", "aggregation", "arrivals", "clock")
    told = [[line.get(name) for name in figures] for line in directory.rounds()]
    return tensors, told


OFTEN = {"fedavg", "scaffold", "diloco", "fedbpt", "ditto", "fedbuff", "fedkseed", "foolsgold"}
"""Those of the fast suite, one of a kind."""


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in ALGORITHMS])
def test_the_same_bits_over_a_network_and_resumed(name: str, tiny: Tiny, network: Network, tmp_path: Path) -> None:
    recipe = recipe_of(tiny, name)
    here, there = tmp_path / "here", tmp_path / "there"
    data = load_data(recipe, tiny.base)
    with (
        closing(new_run(recipe, here, base=tiny.base, **about(data))) as directory,
        closing(LocalEngine(recipe, data, here, base=tiny.base)) as engine,
    ):
        assert run(recipe, engine, directory).status == "finished"
    if not ALGORITHMS[name].asynchronous:
        recipe = recipe_of(tiny, name, "federation.downlink={send: changed}")
    with closing(new_run(recipe, there, base=tiny.base, **about(data))) as directory:
        with closing(network.open(recipe, tiny.base, there)) as engine:
            stopped = Interrupted(engine, before=2)
            assert run(recipe, stopped, directory).status == "interrupted"
        with closing(network.open(recipe, tiny.base, there)) as engine:
            assert run(recipe, engine, directory, resume=True).status == "finished"
    silos = silos_of(name)
    (tensors, told), (wanted, wanted_told) = ended(there, silos), ended(here, silos)
    assert told == wanted_told
    assert tensors.keys() == wanted.keys()
    for place, values in wanted.items():
        assert tensors[place].keys() == values.keys()
        assert [n for n, value in values.items() if not torch.equal(tensors[place][n], value)] == [], place
    assert len({len(data.silo(silo).train) for silo in silos}) > 1, "unequal weights"
    kept = {tensor.split("/")[0] for silo in silos for tensor in wanted.get(silo, {})}
    assert ("rule" in kept) is ALGORITHMS[name].silo_state
    assert ("guard" in kept) is any(guard.error_feedback for guard in recipe.guards)
