"""Rounds under masks: the coordinator holds the mean and nothing else of a silo, and the mean is right."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fedlm.errors import RecipeError, RunError
from fedlm.federation import api
from fedlm.federation.api import run_recipe
from fedlm.federation.engines.choose import make_engine
from fedlm.messages import Engine, Failure, FailureKind, Reply, Request, Stop, Tensors
from tests.federation.conftest import Tiny

UNMEASURED = "data.split={validation: 0, test: 0}"
MASKED = ("federation.algorithm.name=fedavg", "federation.rounds=2", "guards=[{name: mask}]")


def adapter(folder: Path) -> Tensors:
    tensors: Tensors = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
    return tensors


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


STEP = 2 * 0.01 * 3 / (2**15 - 1)
"""Of the quantiser in these recipes: the default bound, by its levels."""


class Leaky:
    """An engine that loses replies, all or those of one session of secure aggregation, and remembers what came."""

    def __init__(self, engine: Engine, lost: dict[str, set[str]] | None = None, session: int | None = None) -> None:
        self.engine, self.lost, self.session, self.seen = engine, lost or {}, session, list[Reply]()

    def silos(self) -> Any:
        return self.engine.silos()

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        for answer in self.engine.exchange(requests, deadline, stop):
            if isinstance(answer, Reply) and self._loses(answer):
                yield Failure(answer.silo, FailureKind.UNREACHABLE, "it is gone")
                continue
            if isinstance(answer, Reply):
                self.seen.append(answer)
            yield answer

    def _loses(self, reply: Reply) -> bool:
        return reply.silo in self.lost.get(reply.verb, ()) and self.session in (None, reply.fields.get("round"))

    def close(self) -> None:
        self.engine.close()


class Runs:
    """Runs of the tiny recipe over engines that lose the replies of some silos to some verbs."""

    def __init__(self, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tiny, self.monkeypatch = tiny, monkeypatch

    def __call__(
        self,
        folder: Path,
        *changes: str,
        lost: dict[str, set[str]] | None = None,
        workers: int = 1,
        plain: bool = False,
        measured: bool = False,
        session: int | None = None,
    ) -> Leaky:
        engines: list[Leaky] = []

        def leaky(*args: Any, **named: Any) -> Leaky:
            engines.append(Leaky(make_engine(*args, **named), lost, session))
            return engines[0]

        self.monkeypatch.setattr(api, "make_engine", leaky)
        rows = () if measured else (UNMEASURED,)
        recipe = self.tiny.recipe(*MASKED[: 2 if plain else 3], *rows, *changes, f"federation.workers={workers}")
        again = folder.exists()
        api.run_recipe(None if again else recipe, run_dir=folder, base=self.tiny.base, resume=again)
        return engines[0]


@pytest.fixture
def run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tiny, monkeypatch)


@pytest.mark.parametrize("weights", ["equal", "examples", "tokens"])
def test_the_mean_is_that_of_a_plain_run_and_no_silo_says_what_it_counted(
    weights: str, tiny: Tiny, tmp_path: Path
) -> None:
    changes = ("federation.algorithm.name=fedavg", "federation.rounds=1", f"federation.algorithm.weights={weights}")
    run_recipe(tiny.recipe(*changes), run_dir=tmp_path / "plain", base=tiny.base)
    run_recipe(tiny.recipe(*changes, MASKED[2]), run_dir=tmp_path / "masked", base=tiny.base)
    plain, masked = adapter(tmp_path / "plain"), adapter(tmp_path / "masked")
    # Each value is off by less than a step; with `tokens` a weight is a number of rows of 64 tokens, here 3 or so.
    atol = STEP if weights != "tokens" else 0.1 * 0.06
    for name, value in plain.items():
        assert not torch.equal(masked[name], value)
        torch.testing.assert_close(masked[name], value, rtol=0, atol=atol)
    ours, theirs = lines(tmp_path / "masked")[1], lines(tmp_path / "plain")[1]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.02)  # weighted as the mean is, there by tokens
    assert all(line.keys() == {"bytes_up", "bytes_down"} for line in ours["silos"].values())


def test_nothing_but_keys_shares_and_the_masked_vector_leaves_a_silo(run: Runs, tmp_path: Path) -> None:
    engine = run(tmp_path / "run", "federation.rounds=1")
    allowed = {
        "keys": ({"encryption", "mask", "signature"}, set()),
        "shares": ({"sealed", "commitment"}, {"receivers"}),
        "train": ({"masked"}, set()),
        "unmask": ({"self", "key"}, {"survived", "dropped"}),
    }
    session = {"run", "round", "attempt", "sent_bytes", "received_bytes"}
    for verb, (tensors, fields) in allowed.items():
        replies = [reply for reply in engine.seen if reply.verb == verb]
        assert len(replies) == 4
        for reply in replies:
            assert (set(reply.tensors), set(reply.fields)) == (tensors, fields | session)
    assert {reply.verb for reply in engine.seen} == {"hello", *allowed}


@pytest.mark.parametrize("verb", ["keys", "shares", "train", "consistency", "unmask"])
def test_a_silo_that_drops_out_at_any_moment_is_missed_and_the_rest_goes_on(
    verb: str, run: Runs, tmp_path: Path
) -> None:
    changes = ("federation.rounds=1", "federation.quorum=0.75", "guards=[{name: mask, dropouts: 0.25, corrupt: 0}]")
    if verb == "consistency":
        changes = (*changes[:2], "guards=[{name: mask, dropouts: 0.25, corrupt: 0, coordinator: malicious}]")
    run(tmp_path / "run", *changes, lost={verb: {"site2"}})
    line = lines(tmp_path / "run")[1]
    inside = verb in ("consistency", "unmask")  # its vector is in the sum already
    assert line["replied"] == ["site0", "site1", *(["site2"] if inside else []), "site3"]
    assert [failure["silo"] for failure in line["failures"]] == ["site2"]
    # the mean is that of the same silos without masks
    run(tmp_path / "plain", *changes[:2], plain=True, lost={} if inside else {"train": {"site2"}})
    for name, value in adapter(tmp_path / "plain").items():
        torch.testing.assert_close(adapter(tmp_path / "run")[name], value, rtol=0, atol=STEP)


def test_too_few_end_the_round_and_a_resumed_run_ends_in_the_same_bits(run: Runs, tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(RunError, match="cannot go on after 'train'"):
        run(tmp_path / "again", lost={"train": {"site0", "site1"}})
    engine = run(tmp_path / "again")
    assert adapter(tmp_path / "again").keys() == adapter(tmp_path / "whole").keys()
    for name, value in adapter(tmp_path / "whole").items():
        assert torch.equal(adapter(tmp_path / "again")[name], value)
    keys = [reply.fields for reply in engine.seen if reply.verb == "keys"]
    assert [(fields["round"], fields["attempt"]) for fields in keys] == [(0, 1)] * 4 + [(1, 0)] * 4


def test_a_sum_that_was_unmasked_is_repeated_with_the_same_silos_or_not_at_all(run: Runs, tmp_path: Path) -> None:
    """The coordinator is lost after the unmasking; then a silo is, or another one that had been lost is back."""
    changes = ("federation.rounds=1", "federation.quorum=0.5", "guards=[{name: mask, dropouts: 0.25, corrupt: 0}]")
    lost = {"train": {"site2"}, "unmask": {"site0", "site1", "site3"}}
    with pytest.raises(RunError, match="cannot go on after 'unmask'"):
        run(tmp_path / "run", *changes, lost=lost)
    with pytest.raises(RunError, match="only with site1 in it"):
        run(tmp_path / "run", *changes, lost={"train": {"site1"}})
    run(tmp_path / "run", *changes)
    assert lines(tmp_path / "run")[1]["replied"] == ["site0", "site1", "site3"]


def test_worker_processes_give_the_same_bits(run: Runs, tmp_path: Path) -> None:
    """A silo's phases may fall to different processes: what it knows is on disk."""
    for workers in (1, 2):
        run(tmp_path / str(workers), "federation.rounds=1", workers=workers)
    for name, value in adapter(tmp_path / "1").items():
        assert torch.equal(adapter(tmp_path / "2")[name], value)
    kept = tmp_path / "2" / "silos" / "site0"
    (file,) = kept.rglob("masks.json")
    assert file.stat().st_mode & 0o777 == 0o600


def test_places_drawn_for_all_silos_alike_are_summed(run: Runs, tmp_path: Path) -> None:
    """With `randk` before the mask only a part travels, and the mean is that of these places."""
    whole = run(tmp_path / "whole", "federation.rounds=1")
    part = run(tmp_path / "part", "federation.rounds=1", "guards=[{name: randk, density: 0.1}, {name: mask}]")
    sizes = [next(reply.tensors["masked"].numel() for reply in e.seen if reply.verb == "train") for e in (whole, part)]
    assert sizes[1] < 0.12 * sizes[0]
    start = run(tmp_path / "start", "federation.rounds=1", "training.lr=1e-12", "guards=[{name: mask, bound: 1}]")
    del start
    moved = [
        float((adapter(tmp_path / "part")[n] != adapter(tmp_path / "start")[n]).float().mean())
        for n in adapter(tmp_path / "part")
    ]
    assert 0.05 < sum(moved) / len(moved) < 0.2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("federation.algorithm.name=ties",), "its server must see each silo's update"),
        (("federation.algorithm.name=fedbuff",), "silos answer one by one"),
        (("federation.algorithm.name=scaffold",), "what masks round away does not come back"),
        (("federation.algorithm.name=flora",), "its server must see each silo's update"),
        (("guards=[{name: topk}, {name: mask}]",), "not after 'topk'"),
        (("guards=[{name: mask}, {name: int8}]",), "leaves nothing to the guards after it"),
        (("training.optimizer=sgd",), "nothing says how far a value moves"),
        (("federation.oversample=0.5", "federation.sample=3"), "who is in the sum is settled"),
        (("federation.sample=2",), "hides none of them"),
        (("evaluation.silos=2",), "a sum over fewer than 3 silos hides none"),
        (("federation.capacity={silos: {site0: {layers: 1}}}",), "a sum needs the same tensors"),
        (("guards=[{name: mask, error_feedback: true}]",), "right on average already"),
    ],
)
def test_what_cannot_be_summed_is_refused_at_load(changes: tuple[str, ...], words: str, tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match=words):
        tiny.recipe(*MASKED, *changes)


def test_a_sum_that_does_not_fit_is_refused_before_anything_is_trained(run: Runs, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="takes 35 bits, and there are 32"):
        run(tmp_path / "run", "guards=[{name: mask, bits: 22, max_weight: 2048}]")
    assert not any(line["round"] == 0 for line in lines(tmp_path / "run"))
