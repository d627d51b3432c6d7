"""Predictors of groups' preferences through whole federations: groups that disagree, and one that took no part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlm.comparison.triple import compare
from fedlm.errors import DataError, FedlmError, ModelError, RecipeError, RunError
from fedlm.federation.api import run_recipe
from fedlm.inference.preferences import GroupPredictor, Question, load_predictor
from fedlm.inference.session import open_chat
from fedlm.training import scores
from tests.algorithms.observed import federate
from tests.federation.groups import OPINIONS, Groups, drawn
from tests.federation.interrupted import ended, lines, over_a_network

SHORT = ("federation.rounds=2", "evaluation.every=1", "training.steps=2")


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Groups:
    return Groups(tmp_path_factory.mktemp("groups"), tiny_model_dir)


@pytest.fixture(scope="module")
def finished(groups: Groups, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_recipe(groups.recipe(), base=groups.base, run_dir=run)
    return run


def question(prompt: str, *answers: str) -> Question:
    return [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for text in answers]


def right(predictor: GroupPredictor, *, money: bool, seed: int) -> float:
    """Of 40 new pairs the share that is predicted as a group likes them which likes money, or school, by 8 others."""
    pairs = [question(*pair) for pair in drawn(48, seed)]
    liked = (1.0, 0.0) if money else (0.0, 1.0)
    found = predictor.shares([(pair, liked) for pair in pairs[:8]], pairs[8:])
    return float(np.mean([(shares[0] > 0.5) == money for shares in found]))


@pytest.mark.slow
def test_one_predictor_serves_groups_that_disagree(groups: Groups, finished: Path, tmp_path: Path) -> None:
    """What a reward model learns from one half it unlearns from the other; the predictor is told who is asked. Rows are
    the same for all groups, so that rewards are right for one half exactly where they are wrong for the other."""
    last = lines(finished)[-1]["validation"]
    assert last["accuracy"] > 0.9 and last["fairness"]["accuracy"]["worst"] > 0.9 and last["alignment"] > 0.8
    reward = ["task=reward", "adapter={rank: 4}", "federation.rounds=6", "training.lr=0.01", "evaluation.every=6"]
    run_recipe(groups.recipe(*reward), base=groups.base, run_dir=tmp_path / "reward")
    assert lines(tmp_path / "reward")[-1]["validation"]["reward_accuracy"] < 0.7


def test_a_group_that_took_no_part(finished: Path) -> None:
    """Pairs that no silo had, of groups of either kind, from 8 examples alone; those turned round, so is the rest."""
    predictor = load_predictor(finished)
    assert min(right(predictor, money=money, seed=seed) for money in (True, False) for seed in (1, 2)) > 0.85


@pytest.mark.parametrize("rows", ["pairs", "opinions"])
def test_the_same_bits_over_a_network_and_resumed(rows: str, groups: Groups, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    recipe = groups.recipe(*SHORT, *([OPINIONS] if rows == "opinions" else []))
    run_recipe(recipe, base=groups.base, run_dir=here)
    over_a_network(recipe, groups.base, there, tmp_path / "network")
    (tensors, told), (wanted, wanted_told) = ended(there), ended(here)
    assert told == wanted_told and tensors.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(tensors[name], value)] == []
    assert all(name.startswith("predictor.") for name in wanted)


def test_distributions_are_learnt_and_measured(groups: Groups, tmp_path: Path) -> None:
    """All groups alike, so that a few rounds are enough: the shares themselves are told, not only who is first."""
    few = ("federation.rounds=6", "evaluation.every=6", "training.steps=8", "data.split={validation: 0.25, test: 0.25}")
    alike = OPINIONS.replace("path: opinions.jsonl", "path: opinions.jsonl, where: {group: [g0, g2]}")
    run_recipe(groups.recipe(alike, *few), base=groups.base, run_dir=tmp_path / "run")
    first, *_, last = lines(tmp_path / "run")
    before, after = first["validation"], last["validation"]
    assert after["alignment"] > 0.8 > before["alignment"] and after["loss"] < 0.25 * before["loss"]
    assert set(last["figures"]) == {"accuracy"} and "perplexity" not in after
    told = json.loads((tmp_path / "run" / "evaluation.json").read_text())["final"]
    assert told["accuracy_interval"][0] > 0.5 and told["fairness"]["alignment"]["worst"] <= told["alignment"]
    pair = ("was given the", "bank and was", "school and was", "the")
    group = [(question(*row[:3]), (6, 1)) for row in drawn(6, 5)]
    (shares,) = load_predictor(tmp_path / "run").shares(group, [question(*pair)])
    assert shares.shape == (3,) and shares.sum() == pytest.approx(1) and shares[0] > shares[1]


def test_the_frozen_model_reads_every_row_once(groups: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One list of training rows and one of held-out ones for each silo, however many rounds."""
    asked: list[int] = []
    ask = scores.mean_states

    def counted(model: object, sequences: list[list[int]], batch_tokens: int) -> object:
        asked.append(len(sequences))
        return ask(model, sequences, batch_tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(scores, "mean_states", counted)
    federate(groups.recipe(*SHORT, "federation.rounds=3"), groups.base, tmp_path / "run")
    assert len(asked) == 8 and sum(asked) == 2 * 4 * 60


@pytest.mark.slow
def test_other_algorithms_and_the_way_on(groups: Groups, tmp_path: Path) -> None:
    """Rules that treat all tensors alike; then a run that goes on where another ended."""
    for name in ("scaffold", "ditto", "fedbuff"):
        recipe = groups.recipe(*SHORT, f"federation.algorithm.name={name}")
        run_recipe(recipe, base=groups.base, run_dir=tmp_path / name)
        first, *_, last = lines(tmp_path / name)
        assert last["validation"]["loss"] != first["validation"]["loss"]
    again = groups.recipe(*SHORT, f"start={{run: {tmp_path / 'scaffold'}, adapter: continue}}")
    run_recipe(again, base=groups.base, run_dir=tmp_path / "again")
    ends = min(line["validation"]["loss"] for line in lines(tmp_path / "scaffold")[1:])  # its best round
    assert lines(tmp_path / "again")[0]["validation"]["loss"] == pytest.approx(ends, abs=1e-6)


def test_compared_with_groups_alone(groups: Groups, tmp_path: Path) -> None:
    changes = (*SHORT, "data.split={validation: 0, test: 0.25}")
    outcome = compare(groups.recipe(*changes), base=groups.base, run_dir=tmp_path / "run", budgets=["steps"])
    rows = {row["arm"]: row for row in outcome["table"]}
    assert outcome["verdict"]["metric"] == "accuracy" and 0 < rows["federated"]["alignment"] < 1
    low, high = rows["federated"]["alignment_interval"]
    assert low <= rows["federated"]["alignment"] <= high


def test_what_a_group_needs(groups: Groups, tmp_path: Path) -> None:
    with pytest.raises(FedlmError, match=r"the group has \d+ held-out rows, and a row is predicted from 20 others"):
        run_recipe(groups.recipe("group_preference.context=20"), base=groups.base, run_dir=tmp_path / "few")
    few = ("group_preference.context=60", "training.batch_size=61", "data.split.validation=0")
    with pytest.raises(FedlmError, match=r"g0: error: silo 'g0': the group has 60 training rows, and 60 of them are a"):
        run_recipe(groups.recipe(*few), base=groups.base, run_dir=tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["adapter={rank: 4}"], "trains a predictor on the frozen model"),
        (["adapter={kind: prompt}"], "trains a predictor on the frozen model"),
        (["task=reward"], r"no use to task 'reward' \(it belongs to group-preference\)"),
        (["task=instruct", "adapter={kind: lora}", "group_preference.context=3"], "has no effect with task 'instruct'"),
        (["task=reward", "adapter={kind: lora, width: 8}"], r"has no effect with 'lora' \(it belongs to predictor\)"),
        (["adapter.rank=4"], "has no effect with 'predictor'"),
        (["adapter.heads=5"], "5 heads cannot share a width of 64"),
        (["training.batch_size=8"], "take more than group_preference.context"),
        (["evaluation.max_examples=8"], "a row is predicted from 8 others"),
        (["training.gradient_checkpointing=true"], "the language model is frozen, and read once"),
        (["federation.algorithm.weights=tokens"], "no target tokens"),
        (["federation.algorithm.name=fedit"], "'fedit' trains lora, not 'predictor'"),
        (["evaluation.metrics=[choice]"], "no figure of the task 'group-preference'"),
        ([OPINIONS, "task=reward", "adapter={rank: 4}"], "cannot learn from opinion rows"),
    ],
)
def test_what_cannot_be_is_refused_when_the_recipe_is_read(changes: list[str], words: str, groups: Groups) -> None:
    with pytest.raises(RecipeError, match=words):
        groups.recipe(*changes)


def test_what_is_asked_of_a_predictor(groups: Groups, finished: Path, tmp_path: Path) -> None:
    predictor = load_predictor(finished)
    pair = question("was given", "bank", "school")
    good = [(pair, (1.0, 0.0))]
    assert predictor.shares(good, []) == []
    for context, questions, words in (
        ([], [pair], "nothing to tell the group by"),
        (good, [pair[:1]], "^question 0: .*at least two conversations"),
        (good, [pair, [*pair, pair[0][:1]]], "^question 1, conversation 2: only what the assistant says last"),
        ([(pair, (1.0, 0.0, 0.0))], [pair], "^example 0: .*2 conversations needs as many shares"),
        ([(pair, (1.0, -1.0))], [pair], "none negative"),
        ([(pair, (0.0, 0.0))], [pair], "not all 0"),
        (good, [question("was " * 400, "bank", "school")], "^question 0, conversation 0: .*tokens"),
    ):
        with pytest.raises(DataError, match=words):
            predictor.shares(context, questions)
    with pytest.raises(RunError, match="no run here"):
        load_predictor(tmp_path)
    with pytest.raises(RunError, match="whose model writes no text"):
        open_chat(str(finished))
    other = groups.recipe("task=reward", "adapter={rank: 2}")
    (tmp_path / "recipe.yaml").write_text(json.dumps(other.model_dump(mode="json")))
    with pytest.raises(ModelError, match="preferences of groups come from 'group-preference'"):
        load_predictor(tmp_path)
