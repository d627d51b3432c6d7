"""Killed anywhere, resumed exactly: SIGKILL at random moments, resume, and the final bits are the whole run's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.federation.conftest import Tiny

DRIVER = Path(__file__).parent / "kill_driver.py"


def drive_all(recipe: Path, cases: list[dict[str, Any]], env: dict[str, str] | None = None) -> int:
    """Run each case whole and killed; asserts that both end in the same bits. Returns how many kills hit a live run."""
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(recipe), json.dumps(cases)],
        capture_output=True,
        text=True,
        env={**(env or os.environ), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == len(cases)
    for result in results:
        assert {"adapter/adapter_model.safetensors", "adapter/model.safetensors"} & set(result["whole"])
        assert result["killed"] == result["whole"]
    return sum(int(result["hits"]) for result in results)


def drive(recipe: Path, root: Path, seed: int, kills: int, *changes: str) -> int:
    """One case."""
    return drive_all(recipe, [{"root": str(root), "seed": seed, "kills": kills, "set": changes}])


@pytest.mark.slow
def test_three_kills_of_a_stateful_algorithm(tiny: Tiny, tmp_path: Path) -> None:
    """SCAFFOLD with kept optimiser moments: every silo holds private state between rounds."""
    assert drive(tiny.base / "recipe.yaml", tmp_path, 11, 3, "training.keep_optimizer=true") > 0


CASES = [
    *[("scaffold", 1, seed) for seed in range(5)],
    *[("fedavg", 1, seed) for seed in range(3)],
    *[("fedadam", 1, seed) for seed in range(3)],
    *[("fedavgm", 1, seed) for seed in range(3)],
    *[("scaffold", 2, seed) for seed in range(4)],
    *[("fedyogi", 2, seed) for seed in range(2)],
]


@pytest.mark.slow
def test_twenty_of_twenty(tiny: Tiny, tmp_path: Path) -> None:
    """Twenty killed runs, two kills each: state in the silos, at the server, in neither; with and without workers."""
    assert len(CASES) == 20
    cases = []
    for algorithm, workers, seed in CASES:
        changes = [f"federation.algorithm.name={algorithm}", f"federation.workers={workers}"]
        if seed % 2:
            changes.append("training.keep_optimizer=true")
        root = tmp_path / f"{algorithm}-{workers}-{seed % 2}"
        root.mkdir(exist_ok=True)
        cases.append({"root": str(root), "seed": seed, "kills": 2, "set": changes})
    hits = drive_all(tiny.base / "recipe.yaml", cases)
    assert hits >= 20, "the kills must hit live runs to prove anything"


@pytest.mark.slow
def test_two_of_two_on_a_real_model(tmp_path: Path, users_cache: str | None) -> None:
    """SmolLM2-135M on news: SCAFFOLD, two workers."""
    import fedlm.recipe
    from fedlm.models.processor import without_bf16
    from fedlm.recipe.load import dump_recipe, load_recipe

    news = load_recipe(Path(fedlm.recipe.__file__).parent / "templates" / "news.yaml")
    small = news.model_copy(
        update={
            "model": news.model.model_copy(update={"dtype": "float32"} if without_bf16() else {}),
            "training": news.training.model_copy(update={"steps": 2, "batch_size": 2, "max_length": 160}),
            "evaluation": news.evaluation.model_copy(update={"metrics": ["loss"], "max_examples": 2}),
            "federation": news.federation.model_copy(
                update={
                    "rounds": 3,
                    "workers": 2,
                    "algorithm": news.federation.algorithm.model_copy(update={"name": "scaffold"}),
                }
            ),
        }
    )
    (tmp_path / "recipe.yaml").write_text(dump_recipe(small))
    environment = {k: v for k, v in os.environ.items() if k != "FEDLM_CACHE"}
    if users_cache is not None:
        environment["FEDLM_CACHE"] = users_cache
    cases = [{"root": str(tmp_path), "seed": seed, "kills": 1, "set": []} for seed in (1, 2)]
    hits = drive_all(tmp_path / "recipe.yaml", cases, environment)
    assert hits >= 1, "a kill must hit a live run to prove anything"
