"""What a silo was asked and what it answered: one JSON line for each request, chained by hashes, on disk before the
reply leaves.

A line holds its sequence number, time, the hash of the line before and its own: SHA-256 over the rest of the line in
canonical form (keys sorted, no spaces). Changing, removing, inserting or moving a line breaks the chain from there on
(Schneier and Kelsey, 'Cryptographic support for secure logs on untrusted machines', USENIX Security 1998, after section
3, without its keys). Whoever can write the file can also make a new chain, or cut lines off its end: that shows only
against a head that was noted elsewhere.

A line never holds text, names of files, or numbers of rows. The last one is torn when a process is killed while it
writes: the next takes its place and is a line that says so, with length and hash of what stood there. `prune` removes
old lines and leaves a checkpoint with their hash in their place, which a chained line at the end confirms.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.federation.disk import disk_errors
from fedlm.files import sync_folder

FILE = "_audit.jsonl"
"""In the silo's private folder; no run's name begins with '_'."""

LONGEST_LINE = 4096
"""Bytes; what `append` writes is far shorter."""

START = "0" * 64
"""What stands for the hash before the first line."""

REQUEST, TORN, CHECKPOINT, PRUNED = "request", "torn", "checkpoint", "pruned"

Line = dict[str, Any]

_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Fault:
    """Where a log is not what was written."""

    line: int | None
    """Number of the line in the file, from 1; None where no line is to blame."""
    what: str


@dataclass
class Audit:
    """A log as read."""

    lines: list[Line] = field(default_factory=list)
    """Those that are whole and say what they are."""
    faults: list[Fault] = field(default_factory=list)
    unfinished: int = 0
    """Bytes at the end that are no whole line: a kill tore it, and the next line will say so."""
    head: str = START
    """Hash of the last line."""


class AuditLog:
    """A silo's log. Every call opens the file anew and holds a lock, so that `prune` may run beside a worker.

    Args:
        file: its folder is made with the first line.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, line: Line) -> str:
        """Write one line and flush it to disk; gives the new head.

        Args:
            line: plain JSON without `seq`, `time`, `before` and `hash`, which are added.

        Raises:
            RunError: the disk is full, or the last line there is none of this log's.
        """
        with disk_errors(self.file, "silo's audit log"), self._locked():
            last, end, torn = self._end()
            lines = _following(last, torn, line)
            _write(self.file, b"".join(map(written, lines)), end)
            return str(lines[-1]["hash"])

    def prune(self, before: datetime) -> int:
        """Remove the lines older than a moment, and leave a checkpoint; gives how many lines were removed.

        Args:
            before: aware.

        Raises:
            RunError: the log is not intact, which a checkpoint would hide; or the disk is full.
        """
        with disk_errors(self.file, "silo's audit log"), self._locked():
            if not self.file.exists():
                return 0
            found = read(self.file)
            if found.faults:
                raise RunError(
                    f"the audit log is not intact ({found.faults[0].what}), and is not pruned",
                    where=f"{self.file}:{found.faults[0].line}",
                    fix="look at it with `fedlm audit log`",
                )
            old = [line for line in found.lines if line["kind"] == CHECKPOINT or _moment(line["time"]) < before]
            if not old or old[-1]["kind"] == CHECKPOINT:
                return 0
            old = found.lines[: found.lines.index(old[-1]) + 1]  # a clock that was put back leaves no holes
            removed = b"".join(map(written, old))
            about = {"kind": CHECKPOINT, "sha256": hashlib.sha256(removed).hexdigest(), "head": old[-1]["hash"]}
            checkpoint = sealed({**about, "removed": len(old), "before": START, "seq": old[-1]["seq"], "time": _now()})
            last, _, torn = self._end()
            confirmed = {"kind": PRUNED, "checkpoint": checkpoint["hash"], "removed": len(old)}
            left = [checkpoint, *found.lines[len(old) :], *_following(last, torn, confirmed)]
            temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")
            try:
                temporary.unlink(missing_ok=True)
                _write(temporary, b"".join(map(written, left)), 0)
                temporary.replace(self.file)
            finally:
                temporary.unlink(missing_ok=True)
            sync_folder(self.file.parent)
            return len(old)

    def _end(self) -> tuple[Line, int, bytes]:
        """The last whole line, where it ends, and what was torn behind it.

        Raises:
            RunError: the last whole line is none of this log's.
        """
        try:
            with self.file.open("rb") as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(max(0, size - 4 * LONGEST_LINE))
                tail = handle.read()
        except FileNotFoundError:
            size, tail = 0, b""
        whole, line_break, torn = tail.rpartition(b"\n")
        if not line_break and len(torn) == size:
            return {"seq": -1, "hash": START}, 0, torn
        try:
            last = parsed(whole.rpartition(b"\n")[2])
        except ValueError:
            raise RunError(
                "the last line of the audit log is none that was written here, so nothing is answered",
                where=str(self.file),
                fix="look at it with `fedlm audit log`; a new log begins once this file is moved away",
            ) from None
        return {"seq": last["seq"], "hash": _link(last)}, size - len(torn), torn

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.file.with_name(f"{self.file.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def read(file: Path, head: str | None = None) -> Audit:
    """Read a log and check its chain.

    Args:
        head: the hash of a line that this log is known to have had, 64 hexadecimal digits.

    Raises:
        OSError: the file cannot be read.
    """
    found, expected, known = Audit(), _Expected(), {START}
    for number, raw in enumerate(_raw_lines(file), 1):
        if not raw.endswith(b"\n"):
            found.unfinished = len(raw)
            break
        try:
            line = parsed(raw[:-1])
        except ValueError as error:
            found.faults.append(Fault(number, str(error)))
            continue
        found.faults += [Fault(number, what) for what in expected.faults(line, number)]
        found.lines.append(line)
        found.head = _link(line)
        known |= {line["hash"], found.head}
    if expected.unconfirmed is not None:
        found.faults.append(Fault(1, "no line confirms this checkpoint"))
    if head is not None and head not in known:
        what = "the remembered head is not in this log: lines were cut off its end, pruned, or it is another log"
        found.faults.append(Fault(None, what))
    return found


def _raw_lines(file: Path) -> Iterator[bytes]:
    """The lines with their line breaks; an endless one is cut to more than a line may have."""
    with file.open("rb") as handle:
        while raw := handle.readline(LONGEST_LINE + 2):
            rest = raw
            while len(rest) == LONGEST_LINE + 2 and not rest.endswith(b"\n"):
                rest = handle.readline(LONGEST_LINE + 2)
            yield raw if raw is rest else raw + b"\n"


class _Expected:
    """What the next line must be."""

    def __init__(self) -> None:
        self.seq, self.before = 0, START
        self.unconfirmed: str | None = None
        """Hash of the checkpoint, until a line confirms it."""

    def faults(self, line: Line, number: int) -> Iterator[str]:
        if line["kind"] == CHECKPOINT:
            if number > 1:
                yield "a checkpoint stands elsewhere than at the beginning"
            self.unconfirmed = line["hash"]
            self.seq, self.before = line["seq"] + 1, _link(line)
            return
        if line["before"] != self.before:
            yield "it does not follow the line before: a line was changed, removed, inserted or moved here"
        elif line["seq"] != self.seq:
            yield f"its number is {line['seq']}, not {self.seq}"
        if line["kind"] == PRUNED and line.get("checkpoint") == self.unconfirmed:
            self.unconfirmed = None
        self.seq, self.before = line["seq"] + 1, line["hash"]


def sealed(line: Line) -> Line:
    """The line with its hash."""
    return {**line, "hash": hashlib.sha256(_canonical(line)).hexdigest()}


def written(line: Line) -> bytes:
    """A line as it stands in the file."""
    return _canonical(line) + b"\n"


def parsed(raw: bytes) -> Line:
    """A line of the file, without its line break.

    Raises:
        ValueError: it is no line as `written` writes it, or its hash is another; says which.
    """
    if len(raw) > LONGEST_LINE:
        raise ValueError("the line is too long")
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("the line is no JSON") from None
    if not isinstance(line, dict) or not _complete(line):
        raise ValueError("the line is none of an audit log")
    body = {name: value for name, value in line.items() if name != "hash"}
    try:
        same = _canonical(line) == raw and hashlib.sha256(_canonical(body)).hexdigest() == line["hash"]
    except ValueError:  # NaN, or half a surrogate pair
        same = False
    if not same:
        raise ValueError("the line was changed: its hash is another")
    return line


def _complete(line: Line) -> bool:
    hashes = ["hash", "before", *(["head", "sha256"] if line.get("kind") == CHECKPOINT else [])]
    try:
        _moment(line.get("time"))
    except (ValueError, TypeError):
        return False
    return (
        type(line.get("seq")) is int
        and line["seq"] >= 0
        and all(isinstance(line.get(name), str) and _HASH.fullmatch(line[name]) for name in hashes)
        and line.get("kind") in (REQUEST, TORN, CHECKPOINT, PRUNED)
    )


def _moment(text: Any) -> datetime:
    """When a line was written. Raises ValueError or TypeError where it does not say."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("no zone")
    return found


def _following(last: Line, torn: bytes, line: Line) -> list[Line]:
    """The line as it follows the last one, behind another that tells of what was torn."""
    lines: list[Line] = []
    notes = [{"kind": TORN, "bytes": len(torn), "sha256": hashlib.sha256(torn).hexdigest()}] if torn else []
    for body in [*notes, line]:
        last = sealed({**body, "seq": last["seq"] + 1, "time": _now(), "before": last["hash"]})
        lines.append(last)
    return lines


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _canonical(line: Line) -> bytes:
    return json.dumps(line, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def _link(line: Line) -> str:
    """What the line after it names: its hash, or that of the last line that a checkpoint stands for."""
    return str(line["head"] if line["kind"] == CHECKPOINT else line["hash"])


def _write(file: Path, data: bytes, at: int) -> None:
    """Write these bytes from a place on, which they end, and flush them to disk; only the owner may read the file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        view, place = memoryview(data), at
        while view:
            done = os.pwrite(descriptor, view, place)
            view, place = view[done:], place + done
        os.ftruncate(descriptor, place)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
