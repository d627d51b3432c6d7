"""The first round of a recipe, simulated exactly as it is, up to what leaves the silos: for attacks on updates.

Every silo of the round is asked through its own door, and trains, clips, adds noise, compresses and masks as the recipe
says. Kept is what the coordinator has afterwards: each silo's update, or their sum where it has nothing else; and,
beside it, which rows were read, by which an attack is judged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from fedlm.algorithms.base import Accumulator
from fedlm.attacks.rows import held_out, some
from fedlm.data.federated import FederatedData
from fedlm.federation.api import new_run, using
from fedlm.federation.coordinator import Federation
from fedlm.federation.engines.local import measured
from fedlm.federation.records import Traffic
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Event, Failure, Observe, Reply, Request, Stop, Tensors
from fedlm.recipe.schema import Recipe
from fedlm.training.encode import TokenSet
from fedlm.training.objective import sequences_of
from fedlm.training.sequences import Encoded

PUBLIC = 500
"""Sequences that stand for public text like the silos'."""


@dataclass(frozen=True)
class FirstRound:
    """What left the silos.

    Attributes:
        updates: by silo, as the coordinator decodes it; empty under masks.
        together: the mean, with noise where there is any, under masks or where the coordinator adds noise; else empty.
        rows: by silo, the sequences that it read.
        public: others of the same source.
    """

    updates: dict[str, Tensors]
    together: Tensors
    rows: dict[str, list[Encoded]]
    public: list[Encoded]


def first_round(
    recipe: Recipe, data: FederatedData, base: Path, *, seed: int = 0, observe: Observe | None = None
) -> FirstRound:
    """Simulate it; nothing is left on disk.

    Args:
        base: the folder that relative paths of the recipe start from.
        seed: chooses the public sequences.

    Raises:
        FedlmError: as `fedlm.federation.coordinator.run` for round 0.
    """
    with tempfile.TemporaryDirectory(prefix="fedlm-attack-") as scratch:
        directory = new_run(recipe, Path(scratch) / "run", base=base)
        with using(directory):
            engine = _Listening(recipe, data, directory.path / "silos", observe)
            federation = Federation(recipe, engine, directory, observe)
            federation.meet()
            state = federation.fresh()
            summed = federation.masks or federation.noise is not None
            accumulator = Accumulator() if summed else federation.algorithm.accumulator(directory.spool)
            folded = federation.collect(state, 0, accumulator, Traffic())
            if federation.noise is not None:
                replies = [folded.fields[name] for name in folded.replied]
                federation.noise.add(accumulator, 0, state.parameters, replies)
            together = {name: tensor.clone() for name, tensor in accumulator.mean()} if summed else {}
            updates: dict[str, Tensors] = {}
            for silo, reply in sorted(engine.replies.items()):
                opened = reply if federation.masks else federation.silos.opened(reply, state.parameters)
                if not federation.masks and isinstance(opened, Reply):
                    updates[silo] = dict(opened.tensors)
            return FirstRound(updates, together, engine.bench.rows(sorted(engine.replies)), _public(engine, seed))


def _public(engine: _Listening, seed: int) -> list[Encoded]:
    """Held-out rows, and rows that were not read in the round."""
    bench, names = engine.bench, engine.silos()
    each = PUBLIC // len(engine.replies) + 1
    unread = [s for silo in sorted(engine.replies) for s in bench.unread(silo, each, seed)]
    return held_out(bench, names, PUBLIC, seed) + unread


@dataclass(frozen=True)
class _Noted(TokenSet):
    """Remembers which examples were taken out of it."""

    taken: set[int] = field(default_factory=set, compare=False)

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if not isinstance(index, slice):  # a slice comes here again, one by one
            self.taken.add(int(index) % len(self))
        return found


class _Bench(Workbench):
    """Remembers which training rows were read."""

    def __init__(self, recipe: Recipe, data: FederatedData) -> None:
        super().__init__(recipe, data)
        self._noted: dict[str, _Noted] = {}

    def training_tokens(self, name: str) -> TokenSet:
        if name not in self._noted:
            tokens = super().training_tokens(name)
            self._noted[name] = _Noted(**{f.name: getattr(tokens, f.name) for f in fields(TokenSet)})
        return self._noted[name]

    def rows(self, silos: Iterable[str]) -> dict[str, list[Encoded]]:
        taken = {silo: sorted(self._noted[silo].taken) for silo in silos if silo in self._noted}
        return {
            silo: sequences_of([TokenSet.__getitem__(self._noted[silo], i) for i in t]) for silo, t in taken.items()
        }

    def unread(self, silo: str, most: int, seed: int) -> list[Encoded]:
        noted = self._noted.get(silo)
        if noted is None:
            return []
        left = some([i for i in range(len(noted)) if i not in noted.taken], most, seed, f"unread {silo}")
        return sequences_of([TokenSet.__getitem__(noted, i) for i in left])


class _Listening:
    """The engine of one process, which keeps what silos answer to `train`."""

    def __init__(self, recipe: Recipe, data: FederatedData, states: Path, observe: Observe | None) -> None:
        self.bench, self.replies = _Bench(recipe, data), dict[str, Reply]()
        self._data, self._states, self._observe = data, states, observe

    def silos(self) -> Sequence[str]:
        return self._data.names

    def exchange(
        self,
        requests: Iterable[Request],
        deadline: float | None = None,  # noqa: ARG002
        stop: Stop | None = None,  # noqa: ARG002
    ) -> Iterator[Reply | Failure]:
        """See `fedlm.messages.Engine`; it waits as long as it takes."""
        self.bench.load()
        for request in requests:
            silo = Silo(request.silo, self.bench, self._states, observe=partial(self._tell, run=request.run))
            answer = silo.handle(request)
            if isinstance(answer, Failure):
                yield answer
                continue
            if answer.verb == "train":
                self.replies[answer.silo] = answer
            yield measured(answer, 0, 0)

    def close(self) -> None:
        """There is nothing to end."""

    def _tell(self, event: Event, run: str) -> None:
        if self._observe is not None:
            self._observe({**event, "run": run})
