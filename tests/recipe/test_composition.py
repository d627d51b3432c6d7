"""What can be combined: the page says what loading a recipe says, and is current."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fedlm.errors import RecipeError
from fedlm.recipe.composition import PROTECTIONS, Case, Protection, Rule, adapters, judge, judge_any, rules, verdicts
from fedlm.recipe.composition_page import write_page, write_text
from fedlm.recipe.load import load_recipe
from fedlm.recipe.methods import ALGORITHMS, KINDS
from fedlm.recipe.tasks import TASKS
from tests.cli.test_models import fedlm

ROOT = Path(__file__).parents[2]


def test_the_page_is_current() -> None:
    written = (ROOT / "docs" / "composition.md").read_text(encoding="utf-8")
    assert written == write_page(), "run `make docs` (or: fedlm recipe matrix --out docs/composition.md)"


def test_a_verdict_is_that_of_loading_the_file(tmp_path: Path) -> None:
    draw, path, seen = random.Random(0), tmp_path / "recipe.yaml", set()
    for algorithm in ALGORITHMS:
        rule = draw.choice(list(rules(algorithm)))
        case = Case(rule, draw.choice(list(TASKS)), draw.choice(PROTECTIONS), draw.choice([*KINDS, "lora-sb"]))
        path.write_text(json.dumps(case.recipe()))
        found = judge(case)
        seen.add(found.allowed)
        if found.allowed:
            assert load_recipe(path) == case.load()
            continue
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        for reason in found.reasons:
            assert reason in str(caught.value)
    assert seen == {True, False}


def test_what_is_allowed_is_what_was_asked_for() -> None:
    """The case's recipe has the algorithm, task, guard, privacy and adapter of the case."""
    for algorithm in ("fedavg", "scaffold", "krum", "streaming-diloco", "fed-sb"):
        for task in TASKS:
            kinds, found = verdicts(Rule(algorithm), task)
            for protection, verdict in zip(PROTECTIONS, found, strict=True):
                assert verdict.case.protection == protection and verdict.case.task == task
                if not verdict.allowed:
                    continue
                recipe = verdict.case.load()
                assert recipe.federation.algorithm.name == algorithm and recipe.task == task
                assert recipe.adapter.kind in kinds
                assert [guard.name for guard in recipe.guards] == ([protection.guard] if protection.guard else [])
                assert (recipe.privacy.unit if recipe.privacy else None) == protection.unit


@pytest.mark.parametrize(
    ("algorithm", "task", "protection", "wanted"),
    [
        ("krum", "instruct", Protection("mask"), "its server must see each silo's update"),
        ("fedavg", "pretrain", Protection(None, "example"), "cuts a row into many examples"),
        ("fedavg", "selector", Protection(None, "example"), "each question would be protected by itself only"),
        ("fedavg", "instruct", Protection("mask", "silo"), ""),
        ("fedbuff", "instruct", Protection(None, "silo"), "there is no sum over a round to add noise to"),
        ("fedbpt", "instruct", Protection("int8"), "a few numbers that have no smaller form"),
        ("fed-sb", "instruct", Protection("topk"), "of which no part can be left out"),
        ("lora-xs", "instruct", Protection("mask", "example"), ""),
    ],
)
def test_some_that_are_known(algorithm: str, task: str, protection: Protection, wanted: str) -> None:
    rule = Rule(algorithm)
    found = judge_any(Case(rule, task, protection, kind) for kind in adapters(rule, task))
    assert wanted in " ".join(found.reasons) and found.allowed is (wanted == "")


def test_error_feedback_is_given_where_a_guard_needs_it() -> None:
    found = judge_any([Case(Rule("scaffold"), "instruct", Protection("int4"))])
    assert found.allowed and found.case.error_feedback
    refused = judge_any([Case(Rule("scaffold"), "instruct", Protection("mask"))])
    assert [reason.split(":")[0] for reason in refused.reasons] == ["guards.0.name"]


def test_in_a_terminal() -> None:
    said = fedlm("recipe", "matrix", "--algorithm", "krum").output
    assert said == write_text("krum")
    assert "  no   mask: guards: not with it: its server must see each silo's update" in said
    assert (
        "unknown algorithm 'krumm'. Fix: did you mean 'krum'"
        in fedlm("recipe", "matrix", "--algorithm", "krumm", code=2).output
    )
