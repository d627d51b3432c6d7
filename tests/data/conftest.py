"""A cache of its own for every test, and short ways to write recipes' data sections."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedlm.data.federated import FederatedData, load_data
from fedlm.recipe.schema import DataSpec


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path

    return write


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., FederatedData]:
    """load(sources, partition=..., ...) -> FederatedData, with the temporary folder as the recipe's."""

    def run(sources: list[dict[str, Any]] | None = None, seed: int = 0, **data: Any) -> FederatedData:
        if sources is not None:
            data = {"partition": {"kind": "iid", "silos": 1, "min_rows": 1}, **data, "sources": sources}
        recipe: Any = SimpleNamespace(task="instruct", data=DataSpec.model_validate(data), seed=seed, privacy=None)
        return load_data(recipe, tmp_path)

    return run
