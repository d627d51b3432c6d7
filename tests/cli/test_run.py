"""`fedlm run`: a real federation of a tiny model, what it prints, and how it answers bad input and interruption."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedlm.cli.main import app
from fedlm.errors import RunError
from tests.report.made_up import write_run

RECIPE = """
name: tiny
model: {{source: {model}, dtype: float32}}
adapter: {{rank: 2}}
data:
  sources:
    - path: rows.jsonl
      columns: {{question: q, choices: [medicine, science, books], answer: a}}
  partition: {{kind: iid, silos: 2}}
training: {{steps: 2, batch_size: 4, max_length: 64, lr: 5.0e-3}}
federation: {{rounds: 2, workers: 1}}
evaluation: {{metrics: [loss, choice]}}
trackers: [tensorboard]
"""


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with recipe.yaml and rows.jsonl, and the current one."""
    draw = random.Random(0)
    hints = {"medicine": "patient dose", "science": "school science", "books": "bank money"}
    with (tmp_path / "rows.jsonl").open("w") as rows:
        for i in range(120):
            answer = draw.choice(list(hints))
            rows.write(json.dumps({"q": f"the {hints[answer]} {i}", "a": answer}) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_model_dir))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    yield tmp_path


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_a_whole_federation(place: Path) -> None:
    answer = call("run", "recipe.yaml", "--run-dir", "runs/a")
    assert answer.exit_code == 0, answer.output
    head = answer.stdout.splitlines()[0].split()
    assert head == ["on", "test", "rows", "before", "after"]
    assert "fedlm chat runs/a" in answer.stdout and "fedlm export runs/a --out" in answer.stdout
    assert "round 2/2" in answer.stderr and "validation loss" in answer.stderr
    assert "round 2/2" not in answer.stdout
    page = (place / "runs/a/report.html").read_text()
    assert "2 silos fine-tuned a LoRA adapter of rank 2" in page

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(place / "runs/a/tensorboard")).Reload().Scalars("validation/loss")
    lines = [json.loads(line) for line in (place / "runs/a/rounds.jsonl").read_text().splitlines()]
    assert [s.value for s in logged] == pytest.approx([line["validation"]["loss"] for line in lines])

    again = call("run", "--resume", "runs/a", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout)["status"] == "finished"

    taken = call("run", "recipe.yaml", "--run-dir", "runs/a")
    assert taken.exit_code == 2 and "already holds a run" in taken.stderr


def test_json_is_all_there_is_on_stdout(place: Path) -> None:
    answer = call("run", "recipe.yaml", "--json", "--no-report", "--set", "federation.rounds=1", "--set", "trackers=[]")
    assert answer.exit_code == 0, answer.output
    value = json.loads(answer.stdout)
    assert value["rounds_done"] == value["rounds_planned"] == 1
    assert value["report"] is None and not list(place.glob("runs/*/report.html"))
    assert value["run_dir"].startswith("runs/tiny-")
    assert "round" not in answer.stderr


def test_a_recipe_elsewhere_finds_its_own_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = place / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    answer = call("run", "../recipe.yaml", "--set", "federation.rounds=1", "--run-dir", "r", "--no-report")
    assert answer.exit_code == 0, answer.output
    assert (away / "r" / "adapter").is_dir()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "fedlm init"),
        (["run", "recipes.yaml"], "did you mean 'recipe.yaml'"),
        (["run", "news"], "fedlm init news --out news.yaml"),
        (["run", "newz.yaml"], "fedlm init news"),
        (["run", "recipe.yaml", "--set", "federation.round=2"], "did you mean 'rounds'"),
        (["run", "--resume", "nowhere"], "no run here"),
        (["run", "--resume", "nowhere", "--run-dir", "x"], "--run-dir does not apply"),
        (["run", "done"], "--resume done"),
        (["run", "recipe.yaml", "--engine", "rat"], "did you mean 'ray'"),
        (["run", "recipe.yaml", "--address", "auto"], "add --engine ray"),
        (["run", "recipe.yaml", "--engine", "ray", "--address", "http://x"], "no address of a Ray cluster"),
        (["run", "recipe.yaml", "--engine", "ray", "--address", "127.0.0.1:1"], "no Ray cluster answers"),
        (["report", "nowhere"], "no run directory"),
        (["report", "."], "not a run directory"),
    ],
)
def test_bad_input_is_answered_in_a_sentence(place: Path, arguments: list[str], said: str) -> None:
    write_run(place / "done")
    answer = call(*arguments)
    assert answer.exit_code == 2
    assert said in answer.stderr and "Traceback" not in answer.output
    assert answer.stdout == ""


@pytest.mark.usefixtures("place")
def test_a_resume_with_a_changed_recipe_says_what_changed() -> None:
    short = ["--set", "federation.rounds=1", "--set", "trackers=[]"]
    assert call("run", "recipe.yaml", "--run-dir", "r", "--no-report", *short).exit_code == 0
    answer = call("run", "--resume", "r", "--set", "training.lr=1e-3")
    assert answer.exit_code == 2 and "training.lr: 0.005 -> 0.001" in answer.stderr


def stand_in(monkeypatch: pytest.MonkeyPatch, ending: Any) -> dict[str, Any]:
    """Put a made-up run in place of the real one; returns what it was called with."""
    import fedlm.federation.api as api

    called: dict[str, Any] = {}

    def run_recipe(recipe: Any, *, run_dir: Path, observe: Any, **options: Any) -> Any:
        called.update(options, recipe=recipe, run_dir=run_dir)
        write_run(run_dir, done=2)
        observe({"kind": "run_started", "run": "x", "rounds": 4, "silos": ["a"], "run_dir": str(run_dir)})
        return ending(run_dir)

    monkeypatch.setattr(api, "run_recipe", run_recipe)
    return called


def test_an_interrupted_run_says_how_to_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlm.federation.records import RunResult

    called = stand_in(monkeypatch, lambda path: RunResult("x", path, "interrupted", 2, 1, 0.5, None, {}, "stopped"))
    answer = call("run", "recipe.yaml", "--run-dir", "r", "--workers", 3)
    assert answer.exit_code == 130
    assert "fedlm run --resume r" in answer.stdout
    assert (place / "r/report.html").exists()
    assert called["recipe"].federation.workers == 3
    answer = call("run", "recipe.yaml", "--run-dir", "r", "--json")
    assert answer.exit_code == 130 and json.loads(answer.stdout)["status"] == "interrupted"


@pytest.mark.parametrize(("error", "code"), [(RunError("the quorum was missed"), 2), (KeyboardInterrupt(), 130)])
def test_a_run_that_breaks_off_leaves_a_report_and_says_how_to_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def ending(_: Path) -> None:
        raise error

    stand_in(monkeypatch, ending)
    answer = call("run", "recipe.yaml", "--run-dir", "r")
    assert answer.exit_code == code
    assert "fedlm run --resume r" in answer.stderr
    assert (place / "r/report.html").exists()
    if code == 2:
        assert answer.stderr.rstrip().endswith("the quorum was missed.")
