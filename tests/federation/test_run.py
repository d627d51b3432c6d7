"""`run_recipe` from end to end on the tiny model: a whole run, resume rules, bad directories, Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedlm.errors import FedlmError, RunError
from fedlm.federation.api import new_run, run_recipe
from fedlm.federation.rundir import RunDir
from fedlm.models.adapters import initial_tensors
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
    assert load_adapter(finished / "adapter", load_recipe(finished / "recipe.yaml").adapter)
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


def test_a_mistake_at_the_start_leaves_nothing_in_the_way(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    asynchronous = ("federation.algorithm.name=fedasync", "federation.algorithm.max_staleness=0")
    for changes, told in (
        (["data.sources.0.path=typo.jsonl"], "typo"),
        (["model.source=/nowhere"], "nowhere"),
        (["adapter.targets=[nothing]"], "nothing"),
        (["adapter.rank=9999"], "rank 9999 is above the size of"),
        ([*asynchronous[:1], "federation.concurrency=5"], "5 silos cannot work at once where there are 4"),
        (["federation.capacity.silos={sit1: {steps: 1}}"], "there is no silo 'sit1'.*did you mean 'site1'"),
        (
            ["federation.capacity.default={seconds: 9.0}", "federation.speeds.silos={sit1: 1.0}"],
            "speeds.silos: there is no silo 'sit1'.*did you mean 'site1'",
        ),
        (asynchronous, "even equally fast ones are . steps late, and 0 are allowed"),
        (["guards=[{name: topk, k: 99999999}]"], "k"),
        # What all silos say alike is said once.
        (
            ["federation.capacity.default.memory=1MB"],
            r"\(site0, site1, site2, site3: error: capacity.memory: a memory of 1MB is too small for any rank",
        ),
    ):
        with pytest.raises(FedlmError, match=told):
            run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=folder)
        assert not folder.exists(), changes


def test_a_fault_at_a_resume_discards_nothing(tiny: Tiny, tmp_path: Path) -> None:
    """Even without data.json, which a user may have removed as advised where it was damaged."""
    folder = tmp_path / "run"
    shutil.copytree(tiny.base, tmp_path / "base")
    run_recipe(tiny.recipe("federation.rounds=1"), base=tmp_path / "base", run_dir=folder)
    (folder / "data.json").unlink()
    (tmp_path / "base" / "rows.jsonl").unlink()
    with pytest.raises(FedlmError, match="rows"):
        run_recipe(None, run_dir=folder, resume=True)
    assert RunDir(folder).checkpoint_rounds() and (folder / "adapter").exists()


def test_resume_on_other_data_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    shutil.copytree(tiny.base, tmp_path / "base")
    recipe = tiny.recipe("federation.rounds=1")
    run_recipe(recipe, base=tmp_path / "base", run_dir=tmp_path / "run")
    rows = tmp_path / "base" / "rows.jsonl"
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(reversed(lines)))  # the same rows: the same data
    assert run_recipe(None, run_dir=tmp_path / "run", resume=True).status == "finished"
    rows.write_text("\n".join(lines[:-20]))
    with pytest.raises(RunError, match="the data has changed since this run began"):
        run_recipe(None, run_dir=tmp_path / "run", resume=True)


def test_conversations_that_the_template_refuses_are_counted_or_named(tiny: Tiny, tmp_path: Path) -> None:
    """`malformed` decides, in training as in measuring."""
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    opening = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    test = "{% if 'bank' in messages[0]['content'] %}{{ raise_exception('no banks') }}{% endif %}"
    (tmp_path / "t.jinja").write_text(test + plain + opening)
    change = f"model.chat_template={tmp_path / 't.jinja'}"
    with pytest.raises(RunError, match=r"rows\.jsonl:\d+: the chat template refuses these messages: no banks"):
        run_recipe(tiny.recipe(change), base=tiny.base, run_dir=tmp_path / "fail")
    recipe = tiny.recipe(change, "data.malformed=skip", "federation.rounds=1")
    assert run_recipe(recipe, base=tiny.base, run_dir=tmp_path / "skip").status == "finished"
    line = json.loads((tmp_path / "skip" / "rounds.jsonl").read_text().splitlines()[1])
    assert all(silo["dropped"] > 0 for silo in line["silos"].values())


def test_a_silo_may_be_called_anything(tiny: Tiny, tmp_path: Path) -> None:
    """'centralised' once meant all rows in one place."""
    text = (tiny.base / "rows.jsonl").read_text().replace("site0", "centralised").replace("site1", "pooled")
    (tmp_path / "rows.jsonl").write_text(text)
    recipe = tiny.recipe("federation.rounds=1", "training.epochs=1.0", "training.steps=null")
    run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "run")
    rows = {n: c["rows"]["train"] for n, c in json.loads((tmp_path / "run" / "data.json").read_text())["silos"].items()}
    line = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[1])
    assert {name: silo["examples"] for name, silo in line["silos"].items()} == rows


def test_a_full_disk_in_a_silo_is_called_that(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedlm.federation.silo.state.write_tensors", full)
    with pytest.raises(RunError, match=r"site0: error: .*the silo's state cannot be written \(its disk is full\)"):
        run_recipe(tiny.recipe(), base=tiny.base, run_dir=tmp_path / "run")


def test_silos_count_by_the_examples_they_hold(tiny: Tiny, tmp_path: Path) -> None:
    """Equal steps, unequal silos: the aggregate is (sum n_i u_i) / (sum n_i), from the replies the silos stored."""
    rows = (tiny.base / "rows.jsonl").read_text().splitlines()
    kept = [r for i, r in enumerate(rows) if json.loads(r)["site"] == "site0" or i % 3 == 0]
    (tmp_path / "rows.jsonl").write_text("\n".join(kept))
    recipe = tiny.recipe("federation.rounds=1", "federation.algorithm.name=fedavg")
    run_recipe(recipe, base=tmp_path, run_dir=tmp_path / "run")
    cards = json.loads((tmp_path / "run" / "data.json").read_text())["silos"]
    counts = {name: card["rows"]["train"] for name, card in cards.items()}
    assert max(counts.values()) > 2 * min(counts.values())
    start = initial_tensors(recipe)
    expected = {name: value.double() for name, value in start.items()}
    for silo, count in counts.items():
        (file,) = (tmp_path / "run" / "silos" / silo).rglob("round-0000.safetensors")
        stored = load_file(file)
        for name in start:
            expected[name] += stored[f"reply/{name}"].double() * count / sum(counts.values())
    found = RunDir(tmp_path / "run").load_checkpoint()
    assert found is not None
    for name in start:
        torch.testing.assert_close(found.parameters[name].double(), expected[name], atol=1e-7, rtol=0)


@pytest.mark.parametrize("adapter", ["lora", "ia3", "full"])
@pytest.mark.parametrize("name", ["fedavg", "fedprox", "scaffold", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_every_algorithm_learns_with_every_kind_of_adapter(tiny: Tiny, tmp_path: Path, name: str, adapter: str) -> None:
    changes = [f"federation.algorithm.name={name}", "federation.rounds=2", f"adapter={{kind: {adapter}}}"]
    changes.append("training.lr=1e-3" if adapter == "full" else "training.lr=0.03")
    if name in ("fedadam", "fedyogi", "fedadagrad"):
        changes.append("federation.algorithm.server_lr=" + ("1e-3" if adapter == "full" else "0.01"))
    folder = tmp_path / "run"
    run_recipe(tiny.recipe(*changes), base=tiny.base, run_dir=folder)
    losses = [json.loads(line)["validation"]["loss"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert losses[2] < losses[0] - 1e-4


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_resumes(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    script = f"""
import sys
from pathlib import Path
from fedlm.federation.api import run_recipe
from fedlm.recipe.load import load_recipe
recipe = load_recipe(Path({str(tiny.base)!r}) / "recipe.yaml", ["training.steps=60", "federation.rounds=2"])
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
