"""Runs that are interrupted in their second round, and what a run ended with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedlm.federation.rundir import RunDir
from fedlm.messages import Engine, Failure, Reply, Request, Stop, Tensors


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
