from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test converts and remembers in a cache of its own."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDLM_CACHE", str(cache))
    return cache
