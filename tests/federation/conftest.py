"""A complete tiny federation: random model, four silos with a few rows each, everything on disk."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from fedlm.recipe.load import load_recipe
from fedlm.recipe.schema import Recipe
from tests.federation.mixed import Seen

WORDS = [
    "patient",
    "dose",
    "medicine",
    "bank",
    "money",
    "school",
    "science",
    "books",
    "was",
    "given",
    "lent",
    "and",
    "to",
]

RECIPE = """
name: tiny
model: {{source: {model}, dtype: float32}}
adapter: {{rank: 2}}
data:
  sources: [{{path: rows.jsonl, columns: {{prompt: prompt, response: response}}}}]
  partition: {{kind: natural, by: site}}
  split: {{validation: 0.2, test: 0.2}}
training: {{steps: 3, batch_size: 4, max_length: 64, lr: 0.01}}
federation: {{rounds: 4, workers: 1, algorithm: {{name: scaffold}}}}
"""


class Tiny:
    """The folder of a tiny recipe, and the recipe with changes: `tiny.recipe('federation.rounds=2')`."""

    def __init__(self, base: Path) -> None:
        self.base = base

    def recipe(self, *changes: str) -> Recipe:
        return load_recipe(self.base / "recipe.yaml", changes)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Tiny:
    base = tmp_path_factory.mktemp("tiny-federation")
    draw = random.Random(0)
    with (base / "rows.jsonl").open("w") as file:
        for number in range(120):
            prompt, response = (" ".join(draw.choices(WORDS, k=k)) for k in (6, 4))
            row = {"prompt": prompt, "response": response, "site": f"site{number % 4}"}
            file.write(json.dumps(row) + "\n")
    (base / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    return Tiny(base)


@pytest.fixture(autouse=True, scope="session")
def users_cache(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Processed data goes to a folder of the test session (worker processes inherit it); gives the cache set before."""
    before = os.environ.get("FEDLM_CACHE")
    os.environ["FEDLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return before


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What trainings and folds of this test's runs see."""
    return Seen(monkeypatch)
