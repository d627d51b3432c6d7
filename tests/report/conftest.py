"""Fixtures for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.report.made_up import write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Any:
    """`write_run` into a fresh folder of this test."""

    def make(**options: Any) -> Path:
        return write_run(tmp_path / "run", **options)

    return make
