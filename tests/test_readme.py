"""The README's commands can be run by CI: its blocks are found, and what isn't run is known."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.run_readme import ROOT, blocks


def test_blocks_are_found_with_their_lines() -> None:
    found = blocks("# a\n\n```bash\nmake demo\n```\n\n```yaml\nx: 1\n```\n```bash no-ci\nrm -rf /\n```\n")
    assert [(b.line, b.text, b.run) for b in found] == [(4, "make demo\n", True), (11, "rm -rf /\n", False)]


def test_a_misspelt_mark_is_an_error() -> None:
    with pytest.raises(SystemExit, match="unknown mark"):
        blocks("```bash noci\nx\n```\n")


def test_the_readme_has_the_demo_and_every_fence_is_closed() -> None:
    text = Path(ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0
    assert any("make demo" in block.text for block in blocks(text) if block.run)
