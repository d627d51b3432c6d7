"""The run directory: atomic, checked, locked, repaired, and clear about full, read-only or damaged disks."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedlm.errors import RunError
from fedlm.federation import rundir
from fedlm.federation.rundir import Checkpoint, Progress, RunDir

META = {"run": "r", "name": "n"}


def checkpoint(round_: int) -> Checkpoint:
    record = {"round": round_, "loss": 0.1 * round_}
    progress = Progress(round_, best_round=0, best_loss=1.5, stale=round_, accepted={"a": round_}, record=record)
    return Checkpoint({"w": torch.full((3, 2), float(round_))}, {"m": torch.zeros(2)}, progress)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / "run", meta=META, recipe_text="name: n\n")


def test_checkpoint_round_trip(run: RunDir) -> None:
    assert run.load_checkpoint() is None
    for round_ in range(3):
        run.save_checkpoint(checkpoint(round_))
    loaded = run.load_checkpoint()
    assert loaded is not None and loaded.progress == checkpoint(2).progress
    assert torch.equal(loaded.parameters["w"], checkpoint(2).parameters["w"])
    run.prune({0, 2})
    assert run.checkpoint_rounds() == [0, 2]


@pytest.mark.parametrize("file", ["model.safetensors", "server.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_corrupt_checkpoint_names_the_file_and_the_way_back(run: RunDir, file: str, damage: str) -> None:
    for round_ in (3, 4):
        run.save_checkpoint(checkpoint(round_))
    path = run.checkpoint_path(4) / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data if damage == "flip" else data[:-5])
    with pytest.raises(RunError) as caught:
        run.load_checkpoint()
    assert str(path) in str(caught.value)
    assert f"remove {run.checkpoint_path(4)}; --resume then continues after round 3" in str(caught.value)


def test_no_intact_checkpoint_says_so(run: RunDir) -> None:
    for round_ in (3, 4):
        run.save_checkpoint(checkpoint(round_))
        (run.checkpoint_path(round_) / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="no earlier checkpoint is intact"):
        run.load_checkpoint()


def test_torn_line_is_left_out_and_repaired(run: RunDir) -> None:
    for round_ in (-1, 0, 1):
        run.append_round({"round": round_})
    file = run.path / "rounds.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    assert [r["round"] for r in run.rounds()] == [-1, 0]
    # The checkpoint of round 1 was in place before its line was written: the line comes back from there.
    assert run.repair_rounds(checkpoint(1).progress) is False
    assert run.rounds()[-1] == checkpoint(1).progress.record
    assert file.read_bytes().endswith(b"\n")


def test_later_rounds_are_dropped_when_put_back(run: RunDir) -> None:
    for round_ in (-1, 0, 1, 2):
        run.append_round({"round": round_})
    assert run.repair_rounds(checkpoint(1).progress) is True
    assert [r["round"] for r in run.rounds()] == [-1, 0, 1]
    assert run.repair_rounds(None) is True
    assert run.rounds() == []


def test_damaged_line_in_the_middle_is_an_error(run: RunDir) -> None:
    (run.path / "rounds.jsonl").write_text('{"round": -1}\n{"rou\n{"round": 1}\n')
    with pytest.raises(RunError, match=r"rounds\.jsonl:2"):
        run.rounds()


def test_a_second_process_is_kept_out(run: RunDir) -> None:
    script = (
        f"from fedlm.federation.rundir import RunDir; from pathlib import Path; RunDir.open(Path({str(run.path)!r}))"
    )
    other = subprocess.run([sys.executable, "-c", script, run.path], capture_output=True, text=True, check=False)
    assert "another process is running in this run directory" in other.stderr
    run.close()
    RunDir.open(run.path).close()


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 1}', "{", "\xff"])
def test_a_damaged_run_json_is_called_that(run: RunDir, text: str) -> None:
    run.close()
    (run.path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        RunDir.open(run.path)


def test_a_copy_beside_a_checkpoint_is_no_checkpoint(run: RunDir) -> None:
    (run.path / "checkpoints" / "round-0001.bak").mkdir()
    assert run.checkpoint_rounds() == []


def test_leftovers_of_a_killed_process_are_swept(run: RunDir) -> None:
    run.save_checkpoint(checkpoint(0))
    (run.path / "checkpoints" / ".round-0001.tmp").mkdir()
    (run.path / ".run.json.77.tmp").write_text("{")
    (run.spool / "reply-1-2.safetensors").write_text("")
    run.close()
    RunDir.open(run.path)
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["round-0000"]
    assert not list(run.path.glob(".*.tmp")) and not list(run.spool.iterdir())


def test_not_a_run_other_version_damaged_taken(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(RunError, match=r"run\.json is missing"):
        RunDir.open(tmp_path / "nothing")
    with pytest.raises(RunError, match="already holds a run"):
        RunDir.create(run.path, meta=META, recipe_text="")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        RunDir.create(tmp_path / "full", meta=META, recipe_text="")
    (run.path / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(RunError, match="layout version 99"):
        RunDir.open(run.path)
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        RunDir.open(run.path)


@pytest.mark.parametrize("left", range(1, 6))
def test_killed_while_being_created(tmp_path: Path, left: int) -> None:
    """Whatever part of an empty run directory exists, the run can simply be started again."""
    path = tmp_path / "run"
    path.mkdir()
    (path / ".lock").write_bytes(b"")
    for folder in ("checkpoints", "silos", "spool")[: left - 1]:
        (path / folder).mkdir()
    if left == 5:
        (path / "recipe.yaml").write_text("name: n\n")
        (path / ".run.json.4711.tmp").write_text("{")
    RunDir.create(path, meta=META, recipe_text="name: n\n").close()
    assert RunDir.open(path).meta["status"] == "running"


def test_a_lone_recipe_or_a_used_folder_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "recipe.yaml").write_text("mine")
    (tmp_path / "b" / "silos" / "x").mkdir(parents=True)
    for name in "ab":
        with pytest.raises(RunError, match="not empty"):
            RunDir.create(tmp_path / name, meta=META, recipe_text="")


def test_silo_states_are_private(run: RunDir) -> None:
    assert (run.path / "silos").stat().st_mode & 0o777 == 0o700


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match="a file stands where"):
        RunDir.create(tmp_path / "runs" / "a", meta=META, recipe_text="")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "full"),
        (errno.EROFS, "read-only file system"),
        (errno.EACCES, "not writable for this user"),
        (errno.EIO, "cannot be written"),
    ],
)
@pytest.mark.parametrize("where", ["write_json", "write_tensors"])
def test_disk_faults_become_a_sentence(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, code: int, words: str, where: str
) -> None:
    run.save_checkpoint(checkpoint(0))

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(rundir, where, fail)
    with pytest.raises(RunError, match=words):
        run.save_checkpoint(checkpoint(1))
    # The checkpoint before is whole and nothing half-written pretends to be a later one.
    assert run.checkpoint_rounds() == [0]
    assert not list((run.path / "checkpoints").glob(".*"))


def test_a_really_full_disk(tmp_path: Path) -> None:
    """A memory file system of 256 KiB, where the machine lets us mount one."""
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting is not permitted here")
    try:
        run = RunDir.create(mount / "run", meta=META, recipe_text="name: n\n")
        big = checkpoint(0)
        big.parameters["w"] = torch.zeros(100_000)
        with pytest.raises(RunError, match="full"):
            run.save_checkpoint(big)
        run.save_checkpoint(checkpoint(0))
        run.close()
    finally:
        subprocess.run(["umount", str(mount)], check=True)
