"""The run directory: everything that says what happened, and everything needed to go on after a kill at any moment.

    run.json            what the run is and how far it got
    recipe.yaml         the recipe as resolved
    start.safetensors   what the run starts from, where that is another run's adapter
    rounds.jsonl        one object per round, appended; round -1 is the base model before training
    checkpoints/round-NNNN/{model.safetensors, server.safetensors, state.json}
    silos/NAME/RUN/     each simulated silo's private state (nobody but the owner can read it)
    spool/              files in flight between processes; empty between rounds
    adapter/, evaluation.json, data.json, comparison.json, report.html

A checkpoint is written beside and renamed into place as a whole folder, and carries its round's line of `rounds.jsonl`,
so the two can never disagree after a crash. Its files are checked by SHA-256 when it is read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from fedlm.errors import RunError
from fedlm.federation.disk import disk_errors, disk_fault
from fedlm.files import read_json, read_tensors, sha256_file, sync_folder, write_atomic, write_json, write_tensors
from fedlm.messages import Tensors

SCHEMA = 1
"""Version of the layout; a run directory of another version is refused."""


@dataclass
class Progress:
    """The part of a checkpoint that is plain JSON."""

    round: int
    """The last finished round; -1 before the first."""
    best_round: int = -1
    best_loss: float | None = None
    stale: int = 0
    """Validated rounds since the best one."""
    accepted: dict[str, int] = field(default_factory=dict)
    """By silo: the last round whose update was aggregated. Holds only silos that took part."""
    record: dict[str, Any] = field(default_factory=dict)
    """The round's object in rounds.jsonl."""
    flight: dict[str, Any] = field(default_factory=dict)
    """What an asynchronous run had under way, and its clock."""
    downlink: dict[str, Any] = field(default_factory=dict)
    """What silos hold of the model, where only what has changed is sent to them."""
    clip: float | None = None
    """Where the next round's clip is, where noise protects silos."""


@dataclass
class Checkpoint:
    parameters: Tensors
    server_state: Tensors
    progress: Progress


_FOLDERS = ("checkpoints", "silos", "spool")
_META = {"schema", "status", "rounds_done", "best_round"}
"""What every run.json has."""


def _unborn(path: Path) -> bool:
    """Whether a folder is empty, or holds only what `RunDir.create` leaves when it is killed before run.json exists."""
    entries = {p.name: p for p in path.iterdir()}
    temporary = {n for n in entries if n.startswith((".run.json.", ".recipe.yaml.")) and n.endswith(".tmp")}
    ours = {".lock", *_FOLDERS}
    names = entries.keys() - temporary
    if any(name in entries and any(entries[name].iterdir()) for name in _FOLDERS if entries.get(name, path).is_dir()):
        return False
    # A lone recipe.yaml is the user's own; ours comes after the lock and all the folders.
    return names <= ours or names == ours | {"recipe.yaml"}


class RunDir:
    """One run's directory. Exactly one process at a time may hold it open for writing (see `lock`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[bytes] | None = None
        self._meta: dict[str, Any] = {}

    # ---------------------------------------------------------------- opening

    @classmethod
    def create(cls, path: Path, *, meta: dict[str, Any], recipe_text: str) -> RunDir:
        """Make a new run directory and lock it.

        Raises:
            RunError: the directory is already a run, is not empty, or cannot be written.
        """
        if (path / "run.json").exists():
            raise RunError(
                "this directory already holds a run",
                where=str(path),
                fix="continue it with --resume, replace it with --force, or choose another",
            )
        if path.is_dir() and not _unborn(path):
            raise RunError(
                "the run directory is not empty and holds no run", where=str(path), fix="choose an empty one"
            )
        self = cls(path)
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self.lock()
            for folder in _FOLDERS:
                (path / folder).mkdir(exist_ok=True)
            (path / "silos").chmod(0o700)
            write_atomic(path / "recipe.yaml", recipe_text.encode())
            self._meta = {
                "schema": SCHEMA,
                "status": "running",
                "rounds_done": 0,
                "best_round": None,
                "restarts": 0,
                **meta,
            }
            write_json(path / "run.json", self._meta)
        return self

    @classmethod
    def open(cls, path: Path, *, write: bool = True) -> RunDir:
        """Open an existing run; with `write`, lock it and clear what an interrupted process left half-written.

        Raises:
            RunError: no run there, another layout version, damaged run.json, or held by another process.
        """
        self = cls(path)
        file = path / "run.json"
        try:
            self._meta = read_json(file)
        except FileNotFoundError:
            raise RunError("there is no run here (run.json is missing)", where=str(path)) from None
        except NotADirectoryError as error:
            raise disk_fault(error, path) from None
        except (ValueError, RecursionError):  # no JSON, or no UTF-8
            raise RunError("run.json is damaged", where=str(file)) from None
        if isinstance(self._meta, dict) and self._meta.get("schema", SCHEMA) != SCHEMA:
            raise RunError(
                f"the run directory has layout version {self._meta['schema']}, this fedlm reads version {SCHEMA}",
                where=str(path),
                fix="use the fedlm version that wrote it (see run.json)",
            )
        if not isinstance(self._meta, dict) or not self._meta.keys() >= _META:
            raise RunError("run.json is damaged", where=str(file))
        if write:
            with disk_errors(path):
                self.lock()
                self._sweep()
        return self

    def lock(self) -> None:
        """Hold the directory against a second process. The kernel lets go when this process ends, however it ends.

        Raises:
            RunError: another process is running in this directory.
        """
        handle = (self.path / ".lock").open("ab")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            raise RunError(
                "another process is running in this run directory", where=str(self.path), fix="wait for it or stop it"
            ) from None
        self._lock = handle

    @property
    def begun(self) -> bool:
        """Whether the first model was measured or a round done: before that there is nothing to go on with."""
        return bool(self.checkpoint_rounds()) or (self.path / "rounds.jsonl").exists()

    def discard(self) -> None:
        """Remove the whole directory."""
        with disk_errors(self.path):
            shutil.rmtree(self.path)
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _sweep(self) -> None:
        """Remove half-written files of a process that was killed."""
        for folder in (self.path, self.path / "checkpoints"):
            if folder.is_dir():
                for leftover in folder.glob(".*.tmp"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        shutil.rmtree(self.spool, ignore_errors=True)
        self.spool.mkdir()

    # ---------------------------------------------------------------- places

    @property
    def spool(self) -> Path:
        return self.path / "spool"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    def checkpoint_path(self, round_: int) -> Path:
        return self.path / "checkpoints" / f"round-{round_:04d}"

    # ---------------------------------------------------------------- run.json

    @property
    def meta(self) -> dict[str, Any]:
        """run.json as it stands."""
        return dict(self._meta)

    @property
    def run(self) -> str:
        return str(self._meta["run"])

    def update_meta(self, **changes: Any) -> None:
        self._meta.update(changes)
        with disk_errors(self.path):
            write_json(self.path / "run.json", self._meta)

    # ---------------------------------------------------------------- rounds.jsonl

    def append_round(self, record: dict[str, Any]) -> None:
        """Append one round's line and flush it to disk."""
        line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
        file = self.path / "rounds.jsonl"
        with disk_errors(file), file.open("ab") as handle:
            handle.write(line.encode())
            handle.flush()
            os.fsync(handle.fileno())

    def rounds(self) -> list[dict[str, Any]]:
        """All whole lines of rounds.jsonl. A torn last line (the process was killed while writing) is left out.

        Raises:
            RunError: a line before the last is damaged.
        """
        return list(self.iterate_rounds())

    def iterate_rounds(self) -> Iterator[dict[str, Any]]:
        """Like `rounds`, one line at a time."""
        file = self.path / "rounds.jsonl"
        if not file.exists():
            return
        torn: int | None = None
        with file.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if torn is not None:
                    raise RunError("a line of rounds.jsonl is damaged", where=f"{file}:{torn}")
                try:
                    if not line.endswith(b"\n"):
                        raise ValueError
                    record = json.loads(line)
                    record["round"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    torn = number
                    continue
                yield record

    def repair_rounds(self, progress: Progress | None) -> bool:
        """Make rounds.jsonl end with the checkpoint's round: drop a torn line and later rounds, add a missing one.

        Without a checkpoint (`progress` is None) all lines go: the run starts over.

        Returns:
            Whether whole later rounds were dropped, that is, whether the run was put back to an earlier round. A kill
            alone never does that, since a checkpoint is in place before its line is written.
        """
        file = self.path / "rounds.jsonl"
        last = -2 if progress is None else progress.round
        kept, dropped, seen = 0, False, progress is None
        with disk_errors(file):
            for record in self.iterate_rounds():
                if record["round"] > last:
                    dropped = dropped or record["round"] >= 0
                    continue
                seen = seen or record["round"] == last
                kept += len((json.dumps(record, sort_keys=True, allow_nan=False) + "\n").encode())
            if file.exists() and file.stat().st_size != kept:
                os.truncate(file, kept)
        if not seen and progress is not None:
            self.append_round(progress.record)
        return dropped

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write a whole checkpoint folder beside its place, flush it, rename it into place."""
        progress = checkpoint.progress
        target = self.checkpoint_path(progress.round)
        temporary = target.with_name(f".{target.name}.tmp")
        with disk_errors(target):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                sums = {}
                for name, tensors in (("model", checkpoint.parameters), ("server", checkpoint.server_state)):
                    file = temporary / f"{name}.safetensors"
                    write_tensors(file, tensors)
                    sums[file.name] = sha256_file(file)
                write_json(temporary / "state.json", {"schema": SCHEMA, "sha256": sums, **vars(progress)})
                if target.exists():
                    shutil.rmtree(target)
                temporary.rename(target)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_folder(target.parent)

    def checkpoint_rounds(self) -> list[int]:
        """Rounds that have a checkpoint, ascending."""
        folder = self.path / "checkpoints"
        if not folder.is_dir():
            return []
        return sorted(int(found[1]) for p in folder.iterdir() if (found := re.fullmatch(r"round-(\d+)", p.name)))

    def load_checkpoint(self, round_: int | None = None) -> Checkpoint | None:
        """The checkpoint of a round, by default the last one; None when the run has none yet.

        Raises:
            RunError: a file is missing or damaged. Names it, and says which earlier round is intact; going back is left
                to the user, since it gives up a finished round.
        """
        rounds = self.checkpoint_rounds()
        if round_ is None:
            if not rounds:
                return None
            round_ = rounds[-1]
        try:
            return self._read_checkpoint(round_)
        except RunError as error:
            raise RunError(error.what, where=error.where, fix=self._way_back(round_, rounds)) from error

    def prune(self, keep: set[int]) -> None:
        """Remove checkpoints of all rounds but these."""
        with disk_errors(self.path):
            for round_ in self.checkpoint_rounds():
                if round_ not in keep:
                    # Renamed first, so that a kill leaves no half-deleted folder that looks like a checkpoint.
                    doomed = self.checkpoint_path(round_)
                    hidden = doomed.with_name(f".{doomed.name}.old.tmp")
                    shutil.rmtree(hidden, ignore_errors=True)
                    doomed.rename(hidden)
                    shutil.rmtree(hidden)

    def _read_checkpoint(self, round_: int) -> Checkpoint:
        folder = self.checkpoint_path(round_)
        file = folder / "state.json"
        try:
            state = read_json(file)
            sums = state.pop("sha256")
            if state.pop("schema") != SCHEMA:
                raise RunError("the checkpoint has another layout version", where=str(file))
            tensors = {}
            for name in ("model", "server"):
                file = folder / f"{name}.safetensors"
                if sha256_file(file) != sums[file.name]:
                    raise RunError(
                        "the checkpoint is corrupt (its SHA-256 differs from the one recorded)", where=str(file)
                    )
                tensors[name] = read_tensors(file)
            return Checkpoint(tensors["model"], tensors["server"], Progress(**state))
        except FileNotFoundError:
            raise RunError("the checkpoint is incomplete (this file is missing)", where=str(file)) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
            raise RunError("the checkpoint is corrupt (its state cannot be read)", where=str(file)) from None

    def _way_back(self, round_: int, rounds: list[int]) -> str:
        for earlier in reversed([r for r in rounds if r < round_]):
            try:
                self._read_checkpoint(earlier)
            except RunError:
                continue
            between = [r for r in rounds if r > earlier]
            names = " and ".join(str(self.checkpoint_path(r)) for r in between)
            return f"remove {names}; --resume then continues after round {earlier}, which is intact"
        names = " and ".join(str(self.checkpoint_path(r)) for r in rounds)
        return f"no earlier checkpoint is intact: remove {names}; --resume then starts over from the first round"
