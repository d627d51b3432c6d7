"""`fedlm eval` on run directories that somebody damaged; see test_compare for what it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inference.conftest import own_cache, run_path, tiny_recipe  # noqa: F401  (fixtures)

from .test_models import fedlm


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema": 1, "ba', "damaged"),
        ('{"schema": 1, "status": "", "rounds_done": 1, "best_round": 0}', "does not say which folder"),
    ],
)
def test_a_damaged_run_json_is_one_sentence(run_path: Path, text: str, words: str) -> None:  # noqa: F811
    (run_path / "run.json").write_text(text)
    for options in ([], ["--base"]):
        stderr = fedlm("eval", str(run_path), *options, code=2).stderr
        assert words in stderr
        assert "run.json" in stderr
