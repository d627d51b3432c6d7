from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedlm.recipe.schema import Recipe

WORDS = {"health": "patient dose medicine", "finance": "bank money lent", "school": "school science books"}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLM_CACHE", str(cache))
        yield cache


def topics(folder: Path, model: Path) -> dict[str, Any]:
    """A recipe of three topics over two very skewed silos; writes its 120 rows into the folder."""
    draw = random.Random(0)
    lines = []
    for i in range(120):
        topic = draw.choice(sorted(WORDS))
        text = " ".join(draw.choices(WORDS[topic].split(), k=5)) + f" {i}"
        lines.append(json.dumps({"text": text, "topic": topic}))
    (folder / "topics.jsonl").write_text("\n".join(lines))
    columns = {"question": "{text}?", "choices": sorted(WORDS), "answer": "topic"}
    return {
        "name": "tiny",
        "model": {"source": str(model), "dtype": "float32"},
        "data": {
            "sources": [{"path": str(folder / "topics.jsonl"), "columns": columns}],
            "partition": {"kind": "dirichlet", "by": "topic", "alpha": 0.3, "silos": 2},
            "split": {"validation": 0.1, "test": 0.3},
        },
        "training": {"lr": 2e-2, "steps": 3, "batch_size": 4, "max_length": 96},
        "federation": {"rounds": 2, "workers": 1},
        "evaluation": {"metrics": ["loss", "choice"]},
    }


@pytest.fixture(scope="module")
def recipe(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return Recipe.model_validate(topics(tmp_path_factory.mktemp("data"), tiny_model_dir))
