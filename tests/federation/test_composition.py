"""What recipes allow really runs: of every algorithm a sample of combinations, a round or as few as there may be."""

from __future__ import annotations

import json
import random
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from fedlm.federation.api import run_recipe
from fedlm.recipe.composition import PROTECTIONS, ROWS, Case, adapters, judge_any, rules
from fedlm.recipe.guards import MASK
from fedlm.recipe.load import load_recipe
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.tasks import TASKS
from tests.federation.conftest import WORDS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composition")
    draw = random.Random(0)
    with (folder / ROWS).open("w") as file:
        for _ in range(120):
            row = {name: " ".join(draw.choices(WORDS, k=k)) for name, k in (("prompt", 6), ("answer", 3), ("worse", 4))}
            more = {"label": draw.choice(["yes", "no"]), "person": f"p{draw.randrange(40)}"}
            file.write(json.dumps(row | more) + "\n")
    return folder


def allowed(algorithm: str) -> list[Case]:
    """Every combination of an algorithm that can be had, with every kind of adapter."""
    found = []
    for rule in rules(algorithm):
        for task in TASKS:
            for kind in adapters(rule, task):
                tried = (judge_any([Case(rule, task, protection, kind)]) for protection in PROTECTIONS)
                found += [verdict.case for verdict in tried if verdict.allowed]
    return found


def sample(algorithm: str) -> list[Case]:
    """One combination with and one without a mask for each kind of privacy, as far as they are allowed."""
    draw = random.Random(zlib.crc32(algorithm.encode()))
    kinds: dict[tuple[bool, str | None], list[Case]] = defaultdict(list)
    for case in allowed(algorithm):
        kinds[case.protection.guard == MASK, case.protection.unit].append(case)
    return [draw.choice(cases) for cases in kinds.values()]


def ran(recipe: dict[str, Any], base: Path, model: Path, run_dir: Path) -> str:
    (base / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return run_recipe(load_recipe(base / "recipe.yaml", [f"model.source={model}"]), base=base, run_dir=run_dir).status


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_allowed_runs(algorithm: str, base: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    for number, case in enumerate(sample(algorithm)):
        assert ran(case.recipe(), base, tiny_model_dir, tmp_path / str(number)) == "finished", case


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_with_silos_protected_the_clip_may_move(
    algorithm: str, base: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With a mask and without, wherever the algorithm allows either."""
    for case in sample(algorithm):
        if case.protection.unit == "silo":
            recipe, folder = case.recipe(), tmp_path / str(case.protection.guard)
            recipe["privacy"]["adaptive"] = {"rate": 0.1}
            assert ran(recipe, base, tiny_model_dir, folder) == "finished", case
            first, second, *_ = map(json.loads, (folder / "rounds.jsonl").read_text().splitlines()[1:])
            assert first["clip"] != second["clip"], case
