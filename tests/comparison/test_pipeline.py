"""A pipeline from its file to its report: chained, resumed after kills, refused when it changes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedlm.comparison.pipeline import run_pipeline
from fedlm.comparison.triple import compare
from fedlm.errors import FedlmError, RecipeError, RunError
from fedlm.files import read_json, read_tensors, sha256_file
from fedlm.recipe.pipeline import load_pipeline
from fedlm.report.facts import read_run
from fedlm.report.html import page as html_page
from fedlm.report.pipeline import read_pipeline, stage_rows, write_pipeline_report
from tests.comparison.pipelines import write

STAGES = ["pretrain", "instruct", "align"]


@pytest.fixture(scope="module")
def file(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("pipeline"), tiny_model_dir)


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "life"
    assert run_pipeline(load_pipeline(file, folder), folder)["status"] == "finished"
    return folder


def adapters(folder: Path) -> dict[str, str]:
    """SHA-256 of every stage's final tensors."""
    files = sorted(folder.glob("*/adapter/*.safetensors"))
    return {str(f.relative_to(folder)): sha256_file(f) for f in files}


def losses(run: Path) -> list[float]:
    return [json.loads(line)["validation"]["loss"] for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_each_stage_starts_from_the_last(finished: Path) -> None:
    meta = {name: read_json(finished / name / "run.json") for name in STAGES}
    assert "start" not in meta["pretrain"]
    assert meta["instruct"]["start"]["run"] == meta["pretrain"]["run"] and meta["align"]["start"]["adapter"] == "stack"
    assert meta["align"]["start"]["lineage"] == [meta["pretrain"]["run"], meta["instruct"]["run"]]
    assert abs(losses(finished / "align")[0] - 0.6931472) < 1e-6, "the reference is the stage's own start"


def test_every_model_is_measured_on_the_same_rows(finished: Path) -> None:
    """The diagonal is what each run measured of itself; the loss of `align` is no likelihood, so it has no column."""
    cells = read_json(finished / "measured.json")["cells"]
    assert set(cells) == {"pretrain", "instruct"}
    assert all(set(row) == {"base", *STAGES} for row in cells.values())
    for stage in cells:
        told = read_json(finished / stage / "evaluation.json")
        assert cells[stage][stage]["loss"] == pytest.approx(told["final"]["loss"], abs=1e-6)
    assert cells["instruct"]["pretrain"]["loss"] == pytest.approx(
        read_json(finished / "instruct" / "evaluation.json")["base"]["loss"], abs=1e-6
    )
    assert cells["pretrain"]["base"]["loss"] > cells["pretrain"]["pretrain"]["loss"]


def test_every_arm_of_a_comparison_begins_with_the_start(file: Path, finished: Path, tmp_path: Path) -> None:
    """A fresh adapter on the instruct stage's, in three arms: 'base' is that stage's final model, in all its terms."""
    recipe = load_pipeline(file, finished).stages[1].recipe
    assert recipe.start is not None
    start = recipe.start.model_copy(update={"run": str(finished / "instruct"), "adapter": "stack"})
    chained = recipe.model_copy(update={"start": start})
    outcome = compare(chained, base=file.parent, run_dir=tmp_path / "run", budgets=["steps"], silos=["site0"])
    metrics = {arm["arm"]: arm["metrics"] for arm in outcome["arms"]}
    final = read_json(finished / "instruct" / "evaluation.json")["final"]["loss"]
    assert metrics["base"]["loss"] == pytest.approx(final, abs=1e-6)
    assert metrics["federated"]["loss"] < final and metrics["centralised"]["loss"] < final
    lines = [
        (tmp_path / "run" / part / "rounds.jsonl").read_text().splitlines()[0] for part in (".", "arms/centralised")
    ]
    one, other = (json.loads(line)["validation"]["loss"] for line in lines)
    assert one == pytest.approx(other, abs=1e-6)
    adapter = read_tensors(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {len(t) for n, t in adapter.items() if "lora_A" in n} == {4}


def test_the_report_says_it_all(finished: Path) -> None:
    facts = read_pipeline(finished)
    assert facts.status == "finished"
    assert [row[0] for row in stage_rows(facts)] == STAGES
    page = write_pipeline_report(finished).read_text()
    own = html_page(read_run(finished / "align"))
    assert "model of the earlier run → after training" in own and "from where the run life-instruct-" in own
    for words in ("pretrain → instruct → align", "LoRA, rank 2, fresh on the last", "Test rows of instruct", "Lineage"):
        assert words in page, words
    assert read_json(finished / "align" / "run.json")["start"]["sha256"][:16] in page
    assert "http" not in page.partition("<script>")[0].replace("http-equiv", ""), "loads nothing"


def test_a_report_of_what_has_begun(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "align")
    (tmp_path / "half" / "measured.json").unlink()
    facts = read_pipeline(tmp_path / "half")
    assert facts.status == "interrupted" and stage_rows(facts)[-1][-1] == "not begun"
    assert "not begun" in write_pipeline_report(tmp_path / "half").read_text()


def test_nothing_finished_is_run_again(finished: Path, file: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.glob("*/rounds.jsonl")} | {
        finished / "measured.json": (finished / "measured.json").stat().st_mtime_ns
    }
    events: list[dict[str, Any]] = []
    run_pipeline(load_pipeline(file, finished), finished, resume=True, observe=events.append)
    assert all(p.stat().st_mtime_ns == when for p, when in before.items())
    assert not [e for e in events if e["kind"] == "run_started"]


@pytest.mark.slow
def test_killed_in_every_stage_and_resumed_to_the_same_bits(file: Path, finished: Path, tmp_path: Path) -> None:
    """SIGKILL after the first stage's first round, at the second's first answer, and where the third begins."""
    folder, driver = tmp_path / "life", Path(__file__).parent / "pipeline_driver.py"
    kills = ("pretrain:round_done", "instruct:silo_done", "align:run_started")
    command = [sys.executable, str(driver), str(file), str(folder), *kills]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert adapters(folder) == adapters(finished)
    cells, wanted = (read_json(f / "measured.json")["cells"] for f in (folder, finished))
    assert cells == wanted


def test_a_stage_that_has_begun_may_not_change_and_one_to_come_may(file: Path, finished: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(finished, half)
    for name in ("align", "instruct"):
        shutil.rmtree(half / name)
    (half / "measured.json").unlink()
    with pytest.raises(RunError, match=r"stage 'pretrain' has begun, .* training.lr: 0.001 -> 0.5"):
        run_pipeline(load_pipeline(file, finished, ["pretrain.training.lr=0.5"]), half, resume=True)
    other = tmp_path / "other.yaml"
    other.write_text(file.read_text().replace("  pretrain:", "  first:"))
    with pytest.raises(RunError, match="the stages that have begun are pretrain, and the pipeline now has first"):
        run_pipeline(load_pipeline(other, half), half, resume=True)

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "run_started":
            raise KeyboardInterrupt

    changed = load_pipeline(file, half, ["instruct.training.lr=0.02"])
    assert run_pipeline(changed, half, resume=True, observe=stop)["status"] == "interrupted"
    with pytest.raises(RunError, match="already holds a pipeline"):
        run_pipeline(changed, half)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  instruct:\n", "  instruct:\n    from: elsewhere\n", "stage 'instruct': .*starts from the stage before it"),
        ("adapter: {rank: 2}", "adapter: {rank: two}", r"stage 'instruct': .*adapter.rank: must be .*integer"),
        ("start: {adapter: stack}", "start: {adapter: stack}\n    adapter: {kind: ia3}", "only LoRA on LoRA"),
        ("name: life\n", "name: life\nmeasure: [align]\n", "its loss is no likelihood of text"),
        ("name: life\n", "name: life\nmeasure: [nothing]\n", "there is no stage 'nothing'"),
        (
            "  align:\n    task: preference",
            "  align: nowhere.yaml\n  rest:\n    task: preference",
            "there is no such file",
        ),
        ("    task: instruct\n", "    task: instrct\n", "stage 'instruct': .*unknown task 'instrct'"),
    ],
)
def test_an_impossible_stage_is_refused_before_any_runs(
    file: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    text = file.read_text()
    assert old in text
    (file.parent / "changed.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(RecipeError, match=said):
        load_pipeline(file.parent / "changed.yaml", tmp_path / "life")


def test_set_names_a_stage(file: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(file, tmp_path, ["instruct.adapter.rank=4"])
    assert pipeline.stages[1].recipe.adapter.rank == pipeline.stages[2].recipe.adapter.rank == 4
    with pytest.raises(FedlmError, match="there is no stage 'instrct'"):
        load_pipeline(file, tmp_path, ["instrct.adapter.rank=4"])


def test_the_command(file: Path, tmp_path: Path, finished: Path) -> None:
    """`fedlm pipeline` and `fedlm report` on what is finished; and what it says of a directory that is none."""
    from typer.testing import CliRunner

    from fedlm.cli.main import app

    run = CliRunner().invoke
    done = run(app, ["pipeline", str(file), "--run-dir", str(finished), "--resume"])
    assert done.exit_code == 0 and "on test rows of instruct" in done.stdout, done.output
    assert (finished / "report.html").is_file() and (finished / "align" / "report.html").is_file()
    told = run(app, ["report", str(finished), "--json"])
    assert json.loads(told.stdout)["status"] == "finished"
    missing = run(app, ["pipeline", str(file), "--run-dir", str(tmp_path / "none"), "--resume"])
    assert missing.exit_code == 2 and "no pipeline here to resume" in missing.output
