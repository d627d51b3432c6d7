from __future__ import annotations

from pathlib import Path

import pytest

from fedlm.federation.rundir import Checkpoint, Progress, RunDir
from fedlm.messages import Tensors
from fedlm.models.export import save_adapter
from fedlm.recipe.load import dump_recipe
from fedlm.recipe.schema import Recipe
from tests.models.helpers import recipe, trained


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDLM_CACHE", str(cache))
    return cache


def write_run(path: Path, of: Recipe, rounds: list[Tensors], best: int | None) -> Path:
    """A finished run's directory with one checkpoint per round and, where there is a best one, its adapter."""
    run = RunDir.create(path, meta={"run": "r", "name": of.name}, recipe_text=dump_recipe(of))
    for number, tensors in enumerate(rounds):
        run.save_checkpoint(Checkpoint(tensors, {}, Progress(number)))
    run.update_meta(best_round=best, rounds_done=len(rounds), status="finished")
    run.close()
    if best is not None:
        save_adapter(path / "adapter", rounds[best], of)
    return path


@pytest.fixture
def tiny_recipe(tiny_model_dir: Path) -> Recipe:
    return recipe(tiny_model_dir)


@pytest.fixture
def run_path(tiny_recipe: Recipe, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tiny_recipe, [trained(tiny_recipe, s) for s in (0.1, 0.4, 0.2)], best=1)
