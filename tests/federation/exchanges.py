"""For the tests of all engines: requests to the tiny federation's silos, comparisons of answers, a running Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

import torch

from fedlm.messages import Failure, Reply, Request, Tensors
from fedlm.models.adapters import initial_tensors
from fedlm.recipe.schema import Recipe


def requests(recipe: Recipe, run: str, silos: Iterable[str], tensors: Tensors | None = None) -> list[Request]:
    """Round 0 of SCAFFOLD for these silos."""
    if tensors is None:
        start = initial_tensors(recipe)
        tensors = start | {f"variate/{n}": torch.zeros_like(t) for n, t in start.items()}
    fields = {"round": 0, "rounds": 4, "accepted": -1}
    return [Request(silo, "train", run, 0, 0, tensors, fields) for silo in silos]


def by_silo(answers: Iterable[Reply | Failure]) -> dict[str, Reply]:
    found = {}
    for answer in answers:
        assert isinstance(answer, Reply), answer
        found[answer.silo] = answer
    return found


def assert_same(got: dict[str, Reply], wanted: dict[str, Reply], counted: bool = True) -> None:
    """The same tensors and figures; the same bytes too where they are `counted` alike."""
    assert got.keys() <= wanted.keys() and got
    for name, reply in got.items():
        other = wanted[name]
        assert reply.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(reply.tensors[n], other.tensors[n]) for n in reply.tensors)
        for field in ("loss", "losses", "tokens", *(("received_bytes", "sent_bytes") if counted else ())):
            assert reply.fields[field] == other.fields[field]


@contextlib.contextmanager
def running_ray(log: Path) -> Iterator[None]:
    """Ray as the engine starts it, with room for the engines of several tests; they find it and leave it running."""
    from fedlm.federation.engines.ray import cluster

    with mock.patch.object(cluster, "_cores", lambda: 8):
        joined = cluster.join(None, log)
    assert joined.folder is not None and joined.folder.is_dir()
    assert joined.folder.stat().st_mode & 0o077 == 0
    yield
    joined.leave()
    assert not joined.folder.exists()
