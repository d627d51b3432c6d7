"""`run_recipe` from end to end on the tiny model: a whole run, resume rules, bad directories, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedlm.errors import RunError
from fedlm.federation.api import new_run, run_recipe
from fedlm.models.export import load_adapter
from fedlm.recipe.load import load_recipe
from tests.federation.conftest import Tiny


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = run_recipe(tiny.recipe("federation.rounds=2"), base=tiny.base, run_dir=folder)
    assert result.status == "finished" and result.rounds_done == 2
    return folder


def test_the_directory_says_what_happened(finished: Path, tiny: Tiny) -> None:
    names = {p.name for p in finished.iterdir()}
    assert names >= {
        "run.json",
        "recipe.yaml",
        "rounds.jsonl",
        "data.json",
        "evaluation.json",
        "adapter",
        "checkpoints",
    }
    assert load_recipe(finished / "recipe.yaml") == tiny.recipe("federation.rounds=2")
    lines = [json.loads(line) for line in (finished / "rounds.jsonl").read_text().splitlines()]
    assert [r["round"] for r in lines] == [-1, 0, 1]
    assert lines[-1]["validation"]["loss"] < lines[0]["validation"]["loss"]
    assert lines[1]["silos"]["site0"]["bytes_up"] > 1000 and lines[1]["peak_pss"] > 10**8
    assert load_adapter(finished / "adapter")
    meta = json.loads((finished / "run.json").read_text())
    assert meta["schema"] == 1 and meta["status"] == "finished" and "torch" in meta["versions"]


def test_no_text_in_the_directory_but_in_private_places(finished: Path) -> None:
    """Rows hold the word 'medicine'; nothing outside the silos' own folders may."""
    for file in finished.rglob("*"):
        if file.is_file() and "silos" not in file.relative_to(finished).parts:
            assert b"medicine" not in file.read_bytes(), file


def test_resuming_a_finished_run_says_so(finished: Path) -> None:
    assert "already finished" in run_recipe(None, run_dir=finished, resume=True).message


def test_resume_with_a_changed_recipe_says_what_changed(finished: Path, tiny: Tiny) -> None:
    changed = tiny.recipe("federation.rounds=3", "training.lr=0.5")
    with pytest.raises(RunError, match=r"federation\.rounds: 2 -> 3; .*|training\.lr: 0\.01 -> 0\.5") as caught:
        run_recipe(changed, run_dir=finished, resume=True)
    assert "training.lr: 0.01 -> 0.5" in str(caught.value) and "federation.rounds: 2 -> 3" in str(caught.value)
    # What changes no bit may differ.
    run_recipe(tiny.recipe("federation.rounds=2", "federation.workers=2"), run_dir=finished, resume=True)


def test_a_taken_directory_is_not_overwritten_unless_forced(finished: Path, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="already holds a run"):
        run_recipe(tiny.recipe(), base=tiny.base, run_dir=finished)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty and holds no run"):
        run_recipe(tiny.recipe(), base=tiny.base, run_dir=tmp_path, force=True)
    assert (tmp_path / "notes.txt").exists()
    old = json.loads((finished / "run.json").read_text())["run"]
    new_run(tiny.recipe(), finished, base=tiny.base, force=True).close()
    assert json.loads((finished / "run.json").read_text())["run"] != old
    assert not (finished / "adapter").exists() and list(finished.parent.iterdir()) == [finished]


def test_ctrl_c_stops_cleanly_and_resumes(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = f"""
import sys
from pathlib import Path
from fedlm.federation.api import run_recipe
from fedlm.recipe.load import load_recipe
recipe = load_recipe(Path({str(tiny.base)!r}) / "recipe.yaml", ["training.steps=200", "federation.rounds=2"])
def observe(event):
    if event["kind"] == "step" and event["step"] == 5:
        print("training", flush=True)
result = run_recipe(recipe, base=Path({str(tiny.base)!r}), run_dir=Path({str(folder)!r}), observe=observe)
print(result.status, result.message, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "training"
    os.kill(process.pid, signal.SIGINT)
    start = time.monotonic()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and time.monotonic() - start < 30
    assert "interrupted" in rest and f"fedlm run --resume {folder}" in rest
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert run_recipe(None, run_dir=folder, resume=True).status == "finished"
