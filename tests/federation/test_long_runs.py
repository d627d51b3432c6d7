"""What long pre-training needs, through whole federations: the stream of text and the spike guard over rounds."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedlm.errors import RecipeError, RunError
from fedlm.federation.api import run_recipe
from fedlm.federation.conversations import Conversations
from fedlm.recipe.capacity import Capacity
from fedlm.training import parallel, spikes
from fedlm.training.plan import make_plan
from tests.federation.conftest import Tiny
from tests.federation.mixed import adapter, lines, model_after

PRETRAIN = (
    "task=pretrain",
    'data.sources=[{path: rows.jsonl, columns: {text: "{prompt} {response}"}}]',
    "data.split.test=0",
    "federation.algorithm={name: fedavg}",
    "federation.rounds=3",
    "training.order=stream",
)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_stream_and_guard_end_in_the_same_bits_killed_or_in_workers(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spikes, "LEAST", 3)
    recipe = tiny.recipe(*PRETRAIN, "training.keep_optimizer=true", "training.spike_guard=0.5")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "whole")
    shares = [silo["figures"]["skipped_steps"] for line in lines(tmp_path / "whole") for silo in line["silos"].values()]
    assert all(share == 0.0 for share in shares[:4]) and any(0 < share <= 1 for share in shares[4:])
    assert all(0 <= line["figures"]["skipped_steps"] <= 1 for line in lines(tmp_path / "whole"))
    silos = [silo for line in lines(tmp_path / "whole") for silo in line["silos"].values()]
    assert all(1e5 < silo["flops_per_second"] / silo["tokens_per_second"] < 1e7 for silo in silos)
    assert not any("mfu" in silo for silo in silos), "the peak of a CPU is not known"
    ask = Conversations.train

    def killed(self: Conversations, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return ask(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Conversations, "train", killed)
        assert run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run").status == "interrupted"
    run_recipe(None, run_dir=tmp_path / "run", resume=True)
    assert same(adapter(tmp_path / "whole"), adapter(tmp_path / "run"))


@pytest.mark.slow
def test_workers_change_no_bit(tiny: Tiny, tmp_path: Path) -> None:
    for workers in (1, 2):
        recipe = tiny.recipe(*PRETRAIN, "training.spike_guard=6.0", f"federation.workers={workers}")
        run_recipe(recipe, base=tiny.base, run_dir=tmp_path / str(workers))
    assert same(adapter(tmp_path / "1"), adapter(tmp_path / "2"))


def test_an_asynchronous_run_has_no_stream(tiny: Tiny) -> None:
    with pytest.raises(RecipeError, match=r"order.*'stream' not with 'fedbuff'"):
        tiny.recipe("federation.algorithm={name: fedbuff}", "training.order=stream")


@pytest.mark.parametrize("algorithm", ["fedasync", "fedmezo"])
def test_where_the_guard_cannot_work_it_is_refused(tiny: Tiny, algorithm: str) -> None:
    with pytest.raises(RecipeError, match="spike_guard"):
        tiny.recipe(f"federation.algorithm={{name: {algorithm}}}", "training.spike_guard=6.0")


def shared(*of: str) -> tuple[str, ...]:
    return (*PRETRAIN, "training.lr=3e-4", *of)


@pytest.mark.slow
def test_silos_whose_steps_two_processes_share_end_as_others_do(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One team serves all silos and rounds; one that is killed fails its silo's round, and another takes its place."""
    options = shared("federation.algorithm={name: scaffold}", "training.micro_batch_size=1")
    run_recipe(tiny.recipe(*options), base=tiny.base, run_dir=tmp_path / "one")
    teams: list[parallel.Team] = []
    made = parallel.Team.__init__

    def watched(self: parallel.Team, *args: Any) -> None:
        made(self, *args)
        teams.append(self)

    monkeypatch.setattr(parallel.Team, "__init__", watched)
    recipe = tiny.recipe(*options, "federation.capacity.default.processes=2")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "two")
    assert len(teams) == 1
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one) and not same(one, two)
    losses = [[line["validation"]["loss"] for line in lines(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    teams.clear()
    gc.collect()
    assert not [child for child in psutil.Process().children() if "fedlm.training.parallel" in child.cmdline()]


FULL = ("adapter={kind: full}", "federation.algorithm={name: diloco}", "training.keep_optimizer=true")


@pytest.mark.parametrize("limit", [{"shards": 2}, {"processes": 2}])
def test_an_owner_s_wish_that_a_run_cannot_grant_is_told(tiny: Tiny, limit: dict[str, int]) -> None:
    kind = "lora" if "shards" in limit else "prompt"
    recipe = tiny.recipe(*PRETRAIN, f"adapter={{kind: {kind}}}")
    with pytest.raises(RunError, match=f"`{next(iter(limit))}` .*'{kind}'"):
        make_plan(recipe, Capacity(**limit), None)


@pytest.mark.slow
def test_silos_with_weights_in_shards_end_as_others_do(tiny: Tiny, tmp_path: Path) -> None:
    options = shared(*FULL, "training.spike_guard=6.0")
    sharded = tiny.recipe(*options, "federation.capacity.default.shards=2")
    run_recipe(tiny.recipe(*options), base=tiny.base, run_dir=tmp_path / "one")
    run_recipe(sharded, base=tiny.base, run_dir=tmp_path / "two")
    one, two = model_after(tmp_path / "one", 2), model_after(tmp_path / "two", 2)
    assert all((one[name] - two[name]).abs().max() < 1e-5 for name in one) and not same(one, two)
    losses = [[line["validation"]["loss"] for line in lines(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.slow
def test_weights_in_shards_resume_in_the_same_bits(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(*shared(*FULL), "federation.capacity.default.shards=2")
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "whole")
    ask = Conversations.train

    def killed(self: Conversations, number: int, *rest: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return ask(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Conversations, "train", killed)
        assert run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run").status == "interrupted"
    run_recipe(None, run_dir=tmp_path / "run", resume=True)
    assert same(model_after(tmp_path / "run", 2), model_after(tmp_path / "whole", 2))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (("adapter={kind: lora}",), "only full weights are sharded"),
        (("federation.algorithm={name: scaffold}", "training.keep_optimizer=false"), "'scaffold' changes whole"),
        (("training.compile=true",), "not with training.compile"),
        (("federation.capacity.default.processes=2",), "give one of the two"),
        (("federation.algorithm={name: fedmezo}", "training.keep_optimizer=false"), "no gradients to share"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny: Tiny, changes: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        tiny.recipe(*shared(*FULL), *changes, "federation.capacity.default.shards=2")


@pytest.mark.slow
def test_a_helper_that_dies_fails_its_silo_s_round_alone(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, killed = parallel.Team.begin, []

    def dying(self: parallel.Team, *args: Any) -> Any:
        if not killed:
            killed.append(os.kill(self.helpers[0], signal.SIGKILL))
        return begin(self, *args)

    monkeypatch.setattr(parallel.Team, "begin", dying)
    recipe = tiny.recipe(
        *shared("federation.capacity.default.processes=2", "federation.rounds=2", "federation.quorum=0.5")
    )
    run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "run")
    first, second = lines(tmp_path / "run")
    assert len(first["silos"]) == 3 and len(second["silos"]) == 4
    assert "shares this silo's training ended (signal SIGKILL)" in first["failures"][0]["reason"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (("federation.algorithm={name: fedmezo}",), "has no gradients to share"),
        (("adapter={kind: prompt}",), "not with adapter.kind 'prompt'"),
        (
            ("task=classify", "data.sources=[{path: c.jsonl, columns: {question: q, choices: [a, b], answer: l}}]"),
            "'classify'",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(tiny: Tiny, changes: tuple[str, ...], why: str) -> None:
    with pytest.raises(RecipeError, match=why):
        tiny.recipe(*PRETRAIN, "training.order=rounds", *changes, "federation.capacity.default.processes=2")
