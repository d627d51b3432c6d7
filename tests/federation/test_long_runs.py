"""What long pre-training needs, through whole federations: the stream of text and the spike guard over rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedlm.errors import RecipeError
from fedlm.federation.api import run_recipe
from fedlm.federation.conversations import Conversations
from fedlm.training import spikes
from tests.federation.conftest import Tiny
from tests.federation.mixed import adapter, lines

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
