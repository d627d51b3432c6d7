"""Real silos driven in this process: an engine that hands each request to its `OwnSilo`, as a network would."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fedlm
from fedlm.federation.identities import Identity
from fedlm.federation.silo.door import PROTOCOL
from fedlm.federation.silo.own import OwnSilo
from fedlm.messages import Failure, Fields, Reply, Request
from fedlm.recipe.schema import Recipe


def greeting(recipe: Recipe, /, **changes: Any) -> Fields:
    """What a coordinator says first over a network."""
    fields = {
        "protocol": PROTOCOL,
        "fedlm": fedlm.__version__,
        "schema": 1,
        "recipe": json.loads(json.dumps(recipe.model_dump(mode="json"))),
    }
    return {**fields, **changes}


class Network:
    """Carries requests to real silos; what `hello` needs beyond a simulation is added here."""

    def __init__(self, recipe: Recipe, silos: dict[str, OwnSilo], model: dict[str, str] | None = None) -> None:
        self._recipe, self._silos = recipe, silos
        self._more = {} if model is None else {"model": model}

    def silos(self) -> Sequence[str]:
        return sorted(self._silos)

    def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:  # noqa: ARG002
        for request in requests:
            if request.verb == "hello":
                fields = {**request.fields, **greeting(self._recipe, **self._more)}
                request = Request(request.silo, "hello", request.run, request.round, request.attempt, {}, fields)
            answer = self._silos[request.silo].handle(request)
            if isinstance(answer, Reply):
                measured = {**answer.fields, "received_bytes": 0, "sent_bytes": 0}
                answer = Reply(
                    answer.silo, answer.verb, answer.run, answer.round, answer.attempt, answer.tensors, measured
                )
            yield answer

    def close(self) -> None:
        return


def data_file(folder: Path, text: str) -> Path:
    file = folder / "data.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def sharing_owner(
    name: str, base: Path, model: str, states: Path, policy: str = "", identity: Identity | None = None
) -> OwnSilo:
    """A real silo that takes the recipe's share of the rows under `base`; `policy` are lines of its owner's."""
    folder = states.parent / f"owner-{name}"
    text = data_file(folder, f"share_of_recipe: true\nbase: {base}\n")
    rules = folder / "policy.yaml"
    rules.write_text(f"models: {{tiny-model0: {model}}}\n{policy}")
    return OwnSilo(name, states, text, rules, identity=identity)
