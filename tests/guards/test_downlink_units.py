"""Both ends of the way down without a model: plans, streams, what is stored, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedlm.data.federated import load_data
from fedlm.federation.api import about, new_run
from fedlm.federation.coordinator import run
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.received import Received, UnsyncedError
from fedlm.federation.versions import HELD, MOVED, NAMES, PLAN, STEP, WHOLE, Downlink, content_hash, digest
from fedlm.guards import get_chain
from fedlm.messages import Failure, FailureKind, Reply, Request, Tensors
from fedlm.recipe.guards import GuardSpec
from fedlm.recipe.schema import Recipe
from tests.algorithms.observed import Observed


def specs(guards: list[dict[str, Any]]) -> list[GuardSpec]:
    return [GuardSpec(**guard) for guard in guards]


def downlink(guards: list[dict[str, Any]], rank: int = 4) -> Downlink:
    way = SimpleNamespace(guards=specs(guards))
    recipe: Any = SimpleNamespace(seed=3, federation=SimpleNamespace(downlink=way))
    return Downlink(recipe, lambda _: rank)


def engine_run(engine_type: type[Observed], recipe: Recipe, base: Path, folder: Path) -> RunDir:
    engine = engine_type(recipe, base, folder / "silos")
    directory = new_run(recipe, folder, base=base, **about(load_data(recipe, base)))
    try:
        run(recipe, engine, directory)
    finally:
        directory.close()
    return RunDir.open(folder, write=False)


class Silos:
    """An engine of silos that only receive."""

    def __init__(self, root: Path, guards: list[dict[str, Any]]) -> None:
        self._root, self._chain = root, get_chain(specs(guards), feedback=True)
        self.got: list[tuple[Request, Tensors]] = []
        """What travelled, and what the silo made of it."""
        self.deaf: set[str] = set()
        self.unsynced = 0

    def silos(self) -> list[str]:
        return []

    def exchange(
        self,
        requests: Iterable[Request],
        deadline: float | None = None,  # noqa: ARG002
        stop: Any = None,  # noqa: ARG002
    ) -> Iterator[Reply | Failure]:
        for request in requests:
            if request.silo in self.deaf:
                yield Failure(request.silo, FailureKind.TIMED_OUT, "")
                continue
            try:
                whole = Received(self._root / request.silo, self._chain, 3).complete(request)
            except UnsyncedError as error:
                self.unsynced += 1
                yield Failure(request.silo, FailureKind.UNSYNCED, str(error))
                continue
            self.got.append((request, whole.tensors))
            yield Reply(request.silo, request.verb, "run", request.round, fields={"received_bytes": 0})

    def close(self) -> None:
        return


class Link:
    """A downlink and its silos; every message must arrive whole."""

    def __init__(self, root: Path, guards: list[dict[str, Any]] = []) -> None:  # noqa: B006
        self.guards, self.silos, self.down = guards, Silos(root, guards), downlink(guards)

    @property
    def unsynced(self) -> int:
        """Messages that did not fit what a silo held."""
        return self.silos.unsynced

    def send(self, verb: str, tensors: Tensors, *names: str, round_: int = 0) -> list[list[int] | None]:
        """The plans of what travelled; None where it was everything."""
        self.silos.got.clear()
        requests = [Request(name, verb, "run", round_, 0, tensors, {"round": round_}) for name in names]
        for answer in self.down.exchange(self.silos, requests, None):
            assert isinstance(answer, Reply) or answer.kind is FailureKind.TIMED_OUT
        for request, whole in self.silos.got:
            assert whole.keys() == tensors.keys() and all(torch.equal(whole[n], tensors[n]) for n in tensors)
            assert all(n in tensors or n.startswith("downlink/") for n in request.tensors)
        return [request.tensors[PLAN].tolist() if PLAN in request.tensors else None for request, _ in self.silos.got]


def model(*names: str, seed: int = 0) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(8, 16, generator=draw) for name in names}


def test_plans(tmp_path: Path) -> None:
    link, theta = Link(tmp_path), model("a", "b", "c")
    assert link.send("evaluate", theta, "x", "y") == [None, None]
    held = HELD["evaluate"]
    assert link.send("train", theta, "x", "z") == [[held] * 3, None], "z was not there to measure"
    moved = {**theta, "b": theta["b"] + 1}
    assert link.send("evaluate", moved, "x", "y", "z") == [[1, 0, 1], [2, 0, 2], [1, 0, 1]]
    assert link.send("train", moved, "x", "y") == [[1, 2, 1], [2, 2, 2]]
    assert link.send("train", moved, "x") == [[1, 1, 1]], "nothing new"


def test_names_that_come_and_go(tmp_path: Path) -> None:
    """SCAFFOLD trains with variates and measures without; other methods' deltas grow by pieces."""
    link, theta = Link(tmp_path), model("a", "b")
    variates = model("variate/a", "variate/b", seed=1)
    assert link.send("evaluate", theta, "x") == [None]
    assert link.send("train", theta | variates, "x") == [[2, 2, 0, 0]]
    assert NAMES in link.silos.got[0][0].tensors
    grown = theta | model("delta.1", seed=2)
    assert link.send("evaluate", grown, "x") == [[1, 1, 0]]
    assert link.send("train", grown | variates, "x") == [[1, 1, 2, 1, 1]]
    assert link.send("train", grown | variates, "x") == [[1] * 5]
    assert NAMES not in link.silos.got[0][0].tensors
    assert link.send("evaluate", theta, "x") == [[1, 1]]
    assert link.send("evaluate", grown, "x") == [[1, 1, 1]], "the piece is in the last training's message"


def test_contents_that_come_back(tmp_path: Path) -> None:
    """Models that are measured otherwise than trained, every round anew: neither is sent twice."""
    link, trained = Link(tmp_path), model("a", "b")
    measured = {**trained, "b": torch.zeros(8, 16)}
    link.send("evaluate", measured, "x")
    assert link.send("train", trained, "x") == [[2, 0]]
    for _ in range(2):
        assert link.send("evaluate", {**measured}, "x") == [[1, 2]]
        assert link.send("train", {**trained}, "x") == [[1, 1]]


def test_a_silo_that_did_not_answer_is_served_by_what_it_answered_last(tmp_path: Path) -> None:
    link, theta = Link(tmp_path), model("a", "b")
    link.send("train", theta, "x", "y")
    link.silos.deaf = {"y"}
    for i in range(3):
        theta = {**theta, "a": theta["a"] + i + 1}
        assert link.send("train", theta, "x", "y") == [[0, 1]]
    link.silos.deaf = set()
    assert link.send("train", theta, "x", "y") == [[1, 1], [0, 1]]


def test_a_rank_has_messages_of_its_own(tmp_path: Path) -> None:
    link, ranks = Link(tmp_path), {"x": 4, "y": 4}
    link.down._rank_of = lambda name: ranks[name]
    theta = model("a", "b")
    link.send("train", theta, "x", "y")
    ranks["y"] = 2
    assert link.send("train", {n: v[:4] for n, v in theta.items()}, "y") == [None]
    assert link.send("train", theta, "x") == [[1, 1]]


def test_steps(tmp_path: Path) -> None:
    """One payload for all who hold the model before; the moved tensors whole for who does not."""
    link = Link(tmp_path, [{"name": "int4"}])
    one = model("a", "b", "c")
    link.send("evaluate", one, "x", "y", "z")
    link.send("train", one, "x", "y")
    two = link.down.rounded(one, {**one, "a": one["a"] + 0.1, "b": one["b"] + 0.2}, 0)
    assert link.send("evaluate", two, "x", "y") == [[3, 3, 1]] * 2
    assert set(link.silos.got[0][0].tensors) == {PLAN, STEP + "0.codes", STEP + "0.scales", STEP + "0.peak"}
    assert link.silos.got[0][0].tensors is link.silos.got[1][0].tensors, "engines send it once"
    assert link.send("train", two, "x", round_=1) == [[2, 2, 1]]
    three = link.down.rounded(two, {**two, "a": two["a"] - 0.1}, 1)
    assert link.send("evaluate", three, "x", "y", "z", round_=1) == [[MOVED["train"], 1, 1], [4, 2, 1], [0, 0, 2]]
    # who misses a step of more than it holds the base of gets all of it whole
    four = link.down.rounded(three, {**three, "a": three["a"] - 0.1, "b": three["b"] - 0.1}, 2)
    link.silos.deaf = {"y"}
    assert link.send("evaluate", four, "x", "y", round_=2) == [[4, 3, 1]], "b has not moved since it was sent to train"
    five = link.down.rounded(four, {**four, "a": four["a"] - 0.1, "b": four["b"] - 0.1}, 3)
    link.silos.deaf = set()
    assert link.send("evaluate", five, "x", "y", round_=3) == [[4, 4, 1], [0, 0, 1]]


def test_the_payload_is_of_all_that_moved_or_of_nothing(tmp_path: Path) -> None:
    """A silo that holds what one of two moved tensors moved from gets both whole."""
    link = Link(tmp_path, [{"name": "int4"}])
    one = model("a", "b")
    link.send("evaluate", one, "x", "y")
    two = link.down.rounded(one, {**one, "a": one["a"] + 0.1}, 0)
    assert link.send("evaluate", two, "x") == [[4, 2]]
    three = link.down.rounded(two, {n: v + 0.1 for n, v in two.items()}, 1)
    assert link.send("evaluate", three, "x", "y") == [[4, 4], None]
    assert link.unsynced == 0


def test_a_silo_that_lost_everything_counts_as_having_what_it_got_again(tmp_path: Path) -> None:
    link, theta = Link(tmp_path), model("a", "b")
    other = theta | model("measured", seed=1)
    link.send("train", theta, "x")
    link.send("evaluate", other, "x")
    for file in (tmp_path / "x" / "run").iterdir():
        file.unlink()
    assert link.send("train", theta, "x") == [None]
    assert link.unsynced == 1
    assert link.send("evaluate", other, "x") == [[1, 1, 0]]
    assert link.unsynced == 1, "it was not asked for what it lost with the rest"


def test_dumped_and_loaded_it_sends_the_same(tmp_path: Path) -> None:
    import json

    link = Link(tmp_path, [{"name": "int4"}])
    one = model("a", "b")
    link.send("evaluate", one, "x", "y")
    two = link.down.rounded(one, {n: v + 0.1 for n, v in one.items()}, 0)
    link.send("evaluate", two, "x")
    fields, tensors = link.down.dump()
    other = Link(tmp_path, [{"name": "int4"}])
    other.down.load(json.loads(json.dumps(fields)), {n: v.clone() for n, v in tensors.items()})
    assert other.send("evaluate", {n: v.clone() for n, v in two.items()}, "x", "y") == [[2, 2], [4, 4]]
    after = [d.rounded(two, {n: v * 0.9 for n, v in two.items()}, 1) for d in (link.down, other.down)]
    assert all(torch.equal(after[0][n], after[1][n]) for n in two)


def test_a_run_that_was_put_back(tmp_path: Path) -> None:
    """Silos have received more than the checkpoint knows. The same again is recognised; other content is sent whole."""
    link = Link(tmp_path, [{"name": "int4"}])
    one = model("a", "b")
    link.send("evaluate", one, "x")
    fields, tensors = link.down.dump()
    two = link.down.rounded(one, {n: v + 0.1 for n, v in one.items()}, 0)
    link.send("evaluate", two, "x")

    again = Link(tmp_path, [{"name": "int4"}])
    again.down.load(fields, tensors)
    redone = again.down.rounded(one, {n: v + 0.1 for n, v in one.items()}, 0)
    assert again.send("evaluate", redone, "x") == [[4, 4]]
    other = Link(tmp_path, [{"name": "int4"}])
    other.down.load(fields, tensors)
    assert other.send("train", one, "x") == [None], "what was measured has moved on"
    elsewhere = other.down.rounded(one, {n: v - 0.1 for n, v in one.items()}, 0)
    assert other.send("evaluate", elsewhere, "x") == [[3, 3]], "from what it has been sent to train"


@pytest.mark.parametrize("what", ["plan", "digest", "names", "codes", "missing", "step", "no guards", "unknown code"])
def test_messages_that_do_not_fit_store_nothing(tmp_path: Path, what: str) -> None:
    link = Link(tmp_path, [{"name": "int4"}])
    one = model("a", "b")
    link.send("evaluate", one, "x")
    two = link.down.rounded(one, {n: v + 0.1 for n, v in one.items()}, 0)
    link.send("evaluate", two, "x")
    request, _ = link.silos.got[0]
    silo, other = tmp_path / "x" / "run", tmp_path / "copy"
    tensors, fields = dict(request.tensors), dict(request.fields)
    chain = link.silos._chain
    match what:
        case "plan":
            tensors[PLAN] = tensors[PLAN][:1]
        case "digest":
            fields[WHOLE] = "0" * 64
        case "names":
            tensors[NAMES] = torch.tensor(list(b"{"), dtype=torch.uint8)
            fields["listed"] = None
        case "codes":
            tensors[STEP + "0.codes"] = tensors[STEP + "0.codes"] ^ 1
        case "missing":
            del tensors[STEP + "0.scales"]
        case "step":
            fields["listed"] = "../../elsewhere"
        case "no guards":
            chain = None
        case "unknown code":
            tensors[PLAN] = tensors[PLAN] + 7
    # the silo as it was before the message
    fresh = Link(other, [{"name": "int4"}])
    fresh.send("evaluate", one, "x")
    before = {file.name: file.read_bytes() for file in (other / "x" / "run").iterdir()}
    with pytest.raises(UnsyncedError):
        Received(other / "x", chain, 3).complete(Request("x", "evaluate", "run", 0, 0, tensors, fields))
    assert {file.name: file.read_bytes() for file in (other / "x" / "run").iterdir()} == before
    assert silo.is_dir()


def test_a_step_that_is_not_finite_is_refused_whatever_its_digest(tmp_path: Path) -> None:
    link, one = Link(tmp_path / "sent", [{"name": "bf16"}]), model("a", "b")
    link.send("evaluate", one, "x")
    link.send("evaluate", link.down.rounded(one, {n: v + 0.1 for n, v in one.items()}, 0), "x")
    request, _ = link.silos.got[0]
    held = Link(tmp_path / "held", [{"name": "bf16"}])
    held.send("evaluate", one, "x")
    tensors = request.tensors | {STEP + "0.values": torch.full_like(request.tensors[STEP + "0.values"], math.nan)}
    wanted = {name: content_hash(torch.full_like(value, math.nan)) for name, value in one.items()}
    bad = replace(request, tensors=tensors, fields={**request.fields, WHOLE: digest(wanted)})
    with pytest.raises(UnsyncedError, match=r"does not fit the message \(UpdateRefused\)"):
        Received(tmp_path / "held" / "x", held.silos._chain, 3).complete(bad)


def test_a_request_without_a_digest_is_taken_as_it_is(tmp_path: Path) -> None:
    request = Request("x", "evaluate", "run", 0, 0, model("a"), {"role": "test", "plain": True})
    assert Received(tmp_path / "x", None, 3).complete(request) is request
    assert not (tmp_path / "x").exists()
