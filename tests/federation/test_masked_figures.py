"""Held-out figures under masks: the coordinator holds their sum and no silo's, and the sum is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedlm.data.federated import load_data
from fedlm.errors import RunError
from fedlm.federation.silo import Silo, Workbench
from fedlm.messages import Failure, FailureKind, Request
from fedlm.models.adapters import initial_tensors
from tests.federation.conftest import Tiny
from tests.federation.test_masked import MASKED, Runs, lines, run

__all__ = ["run"]

ONE = "federation.rounds=1"
SPARE = ("federation.quorum=0.75", "guards=[{name: mask, dropouts: 0.25, corrupt: 0}]")


def evaluation(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return found


def test_the_sum_is_that_of_a_plain_run_and_only_the_sum_is_known(run: Runs, tmp_path: Path) -> None:
    engine = run(tmp_path / "masked", ONE, measured=True)
    plain = run(tmp_path / "plain", ONE, measured=True, plain=True)
    ours, theirs = lines(tmp_path / "masked"), lines(tmp_path / "plain")
    before = [evaluation(tmp_path / name)["base"] for name in ("masked", "plain")]
    for masked, open_ in ((ours[0]["validation"], theirs[0]["validation"]), (before[0], before[1])):
        assert masked["loss_tokens"] == open_["loss_tokens"] and masked["examples"] == open_["examples"]
        assert masked["loss"] == pytest.approx(open_["loss"], abs=1e-7)
        assert masked["perplexity"] == pytest.approx(open_["perplexity"], rel=1e-6)
    for summary in (ours[0]["validation"], ours[1]["validation"], *evaluation(tmp_path / "masked").values()):
        assert summary["silos"] == summary["fairness"] == {} and summary["summed"] == 4
    # Four models were measured, and each silo sent a masked vector for each and nothing beside it.
    replies = [reply for reply in engine.seen if reply.verb == "evaluate"]
    session = {"run", "round", "attempt", "sent_bytes", "received_bytes"}
    assert len(replies) == 16
    assert all((set(r.tensors), set(r.fields)) == ({"masked"}, session) for r in replies)
    assert len({bytes(r.tensors["masked"].numpy()) for r in replies}) == 16
    # How many rows are held out would bound what a silo counts.
    cards = [json.loads((tmp_path / name / "data.json").read_text())["silos"] for name in ("masked", "plain")]
    for name, card in cards[1].items():
        for role, rows in card["rows"].items():
            told = cards[0][name]["rows"][role]
            assert told >= rows > told // 2 and told & (told - 1) == 0
    assert {"loss_sum"} <= plain.seen[-1].fields.keys()


def test_silos_that_drop_out_are_missed(run: Runs, tmp_path: Path) -> None:
    run(tmp_path / "run", ONE, *SPARE, measured=True, lost={"evaluate": {"site2"}})
    run(tmp_path / "plain", ONE, SPARE[0], measured=True, plain=True, lost={"evaluate": {"site2"}})
    ours, theirs = (lines(tmp_path / name)[0]["validation"] for name in ("run", "plain"))
    assert ours["summed"] == 3 and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-7)
    assert ours["loss_tokens"] == theirs["loss_tokens"]
    assert [failure["silo"] for failure in ours["failures"]] == ["site2"]


def test_a_sum_that_was_unmasked_is_repeated_with_the_same_silos(run: Runs, tmp_path: Path) -> None:
    """The coordinator is lost after the unmasking of the figures after round 0; nobody may see another sum of them."""
    half = (ONE, "federation.quorum=0.5", SPARE[1])
    lost = {"evaluate": {"site2"}, "unmask": {"site0", "site1", "site3"}}
    with pytest.raises(RunError, match="cannot go on after 'unmask'"):
        run(tmp_path / "run", *half, measured=True, lost=lost, session=1)
    with pytest.raises(RunError, match=r"validation rows after round 0 was unmasked once, and .* only with site1 in"):
        run(tmp_path / "run", *half, measured=True, lost={"evaluate": {"site1"}}, session=3)  # 2: the base model again
    run(tmp_path / "run", *half, measured=True)
    assert [line["validation"]["summed"] for line in lines(tmp_path / "run")] == [4, 3]


def test_a_resumed_run_ends_in_the_same_figures_on_any_number_of_workers(run: Runs, tmp_path: Path) -> None:
    run(tmp_path / "whole", ONE, measured=True)
    with pytest.raises(RunError, match="cannot go on after 'train'"):
        run(tmp_path / "again", ONE, measured=True, workers=2, lost={"train": {"site0", "site1"}})
    run(tmp_path / "again", ONE, measured=True, workers=2)
    for found in zip(*(lines(tmp_path / name) for name in ("whole", "again")), strict=True):
        assert found[0]["validation"] == found[1]["validation"]
    assert evaluation(tmp_path / "whole") == evaluation(tmp_path / "again")


def test_models_of_each_silos_own_are_summed_and_not_measured_on_others_rows(run: Runs, tmp_path: Path) -> None:
    run(tmp_path / "run", ONE, "federation.algorithm.name=fedsa-lora", measured=True)
    found = evaluation(tmp_path / "run")
    assert found.keys() == {"base", "final"} and found["final"]["summed"] == 4


def test_too_few_silos_for_a_sum_measure_nothing(run: Runs, tmp_path: Path) -> None:
    """Of four silos one may tell and one be gone, and two are left; of three asked for figures one would be."""
    risk = "guards=[{name: mask, dropouts: 0.25, corrupt: 0.25}]"
    engine = run(tmp_path / "run", ONE, risk, "evaluation.silos=3", measured=True)
    assert [line["validation"] for line in lines(tmp_path / "run")] == [None, None]
    assert not (tmp_path / "run" / "evaluation.json").exists() and "evaluate" not in {r.verb for r in engine.seen}


def test_a_silo_answers_nobody_who_asks_for_its_own_figures(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny.recipe(*MASKED)
    silo = Silo("site1", Workbench(recipe, load_data(recipe, tiny.base)), tmp_path)
    tensors = initial_tensors(recipe)
    for more, words in (
        ({}, "under masks, and the request says not with whom"),
        ({"masks": {"arrays": {}, "fields": {}}}, "has given no keys"),
        ({"items": True, "masks": {}}, "only in sums over silos"),
        ({"rows_of": "others"}, "only in sums over silos"),
        ({"plain": True}, "only in sums over silos"),
    ):
        answer = silo.handle(Request("site1", "evaluate", "run", -1, 0, tensors, {"role": "test", **more}))
        assert isinstance(answer, Failure) and answer.kind is FailureKind.REFUSED, answer
        assert words in answer.reason
