"""A processor without bf16: known by its flags, told to those whose model is in bf16, and to nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from ruamel.yaml import YAML

from fedlm.models import processor
from fedlm.recipe.model import ModelSpec
from fedlm.recipe.starters import pipelines, read_template, templates
from fedlm.report.progress import Progress

OLD, NEW = {"avx", "avx2", "fma"}, {"avx2", "avx512_bf16"}


@pytest.mark.parametrize(
    ("flags", "dtype", "told"),
    [(OLD, "bfloat16", True), (NEW, "bfloat16", False), (OLD, "float32", False), (set(), "bfloat16", False)],
)
def test_who_is_told(flags: set[str], dtype: str, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "cpu_flags", lambda: flags)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    sentence = processor.slow_type(ModelSpec.model_validate({"source": "x", "dtype": dtype, "device": "cpu"}))
    assert (sentence is not None and "--set model.dtype=float32" in sentence) if told else sentence is None


def test_a_shipped_recipe_is_written_for_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every template, pipelines too, is in float32 where that is faster, and as it is shipped elsewhere."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(processor, "GPUS", (str(tmp_path / "gpu"),))
    for name in {**templates(), **pipelines()}:
        text = read_template(name)
        monkeypatch.setattr(processor, "cpu_flags", lambda: NEW)
        assert processor.for_this_machine(text) == text
        monkeypatch.setattr(processor, "cpu_flags", lambda: OLD)
        here = YAML().load(processor.for_this_machine(text))
        assert here.get("common", here)["model"]["dtype"] == "float32"
        (tmp_path / "gpu").touch()
        assert processor.for_this_machine(text) == text
        (tmp_path / "gpu").unlink()


def test_a_note_is_shown_once(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        progress = Progress(Console(file=file))
        for arm in ("a", "b"):
            progress({"kind": "note", "text": "Note: slow", "arm": arm})
        progress({"kind": "note", "text": "Note: other"})
    assert (tmp_path / "out").read_text() == "Note: slow\nNote: other\n"
