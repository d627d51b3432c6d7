"""An append-only file of JSON lines that survives a crash at any moment and shows whether it was changed.

Each line holds its index, the hash of the line before, and its own; whoever changes, drops or adds one in the middle
breaks the chain. Beside the file lies its last line once more (`NAME.last`), written and flushed *before* the line
itself: a line torn by a crash, or lost, is completed from there when the file is next opened.

Cutting off several whole lines, with `.last` changed to match, leaves a valid shorter chain: keep a receipt elsewhere,
and ask `Chain.holds`. Both files are readable by their owner alone. One process writes at a time (flock).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedlm.errors import PrivacyError

Record = dict[str, Any]

GENESIS = "0" * 64
RESERVED = frozenset({"index", "previous", "hash"})
READS = 5
"""Attempts to read a chain that somebody is just writing."""


class Chain:
    """The one writer of a file.

    Args:
        path: created, with its folder present, if it is not there.

    Raises:
        PrivacyError: another process writes it, others may read it, or its lines are not what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._broken = False
        self._file = _open_private(path)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise PrivacyError(
                    "another process is writing it", where=str(path), fix="wait for it, or end it, and try again"
                ) from None
            data = path.read_bytes()
            self.records, whole, lost = _verified(path, data, _read(_last_of(path)))
            self.recovered = lost is not None
            if lost is not None or whole < len(data):
                os.ftruncate(self._file, whole)
                if lost is not None:
                    _write(self._file, lost)
                os.fsync(self._file)
                _sync(path.parent)
        except BaseException:
            os.close(self._file)
            raise

    @property
    def head(self) -> str:
        """Hash of the last line."""
        return str(self.records[-1]["hash"]) if self.records else GENESIS

    def append(self, body: Record) -> Record:
        """Add a line; when this returns it is on disk, twice.

        Raises:
            PrivacyError: the body uses a name of the chain's own, or an earlier line failed.
        OSError: the disk is full, or broken.
        """
        if self._broken:
            raise PrivacyError("a line could not be written to its end", where=str(self.path), fix="open it again")
        record = linked(body, len(self.records), self.head)
        line = _line(record)
        # Until all of it is on disk: whatever stops it here, opening the file again counts the line.
        self._broken = True
        _replace(_last_of(self.path), line)
        _write(self._file, line)
        os.fsync(self._file)
        self._broken = False
        self.records.append(record)
        return record

    def holds(self, index: int, digest: str) -> bool:
        """Whether a line that was once written is still there."""
        return 0 <= index < len(self.records) and self.records[index]["hash"] == digest

    def close(self) -> None:
        """Give the file up to other writers."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_chain(path: Path) -> list[Record]:
    """Its records, verified; without a lock and without mending, but counting a line that is in `.last` alone.

    Raises:
        PrivacyError: there is no such file, or its lines are not what was written.
    """
    for attempt in range(READS):
        try:
            last = _read(_last_of(path))
            return _verified(path, path.read_bytes(), last)[0]
        except FileNotFoundError:
            raise PrivacyError("there is no such ledger", where=str(path)) from None
        except PrivacyError:  # perhaps a line was written between both reads
            if attempt == READS - 1:
                raise
    raise AssertionError("every attempt returns or raises")


def linked(body: Record, index: int, previous: str) -> Record:
    """A body with its place in the chain."""
    if taken := RESERVED & set(body):
        raise PrivacyError(f"a record cannot have fields named {', '.join(sorted(taken))}")
    record = {**body, "index": index, "previous": previous}
    return {**record, "hash": hashlib.sha256(_canonical(record)).hexdigest()}


def _verified(path: Path, data: bytes, last: bytes) -> tuple[list[Record], int, bytes | None]:
    """Records; how many bytes of the file are whole lines; and the line that only `.last` holds, if there is one."""
    whole = data.rfind(b"\n") + 1
    records: list[Record] = []
    for line in data[:whole].splitlines(keepends=True):
        records.append(_checked(path, line, len(records), str(records[-1]["hash"]) if records else GENESIS))
    if last and (not records or last != _line(records[-1])):
        # Written before its line: it continues the chain, or something else happened to the file than a crash.
        record = _checked(_last_of(path), last, len(records), str(records[-1]["hash"]) if records else GENESIS)
        return [*records, record], whole, last
    if whole < len(data) or (records and not last):
        raise PrivacyError(
            f"its end is not what was written (after line {len(records)}), and {_last_of(path).name} does not hold "
            "the rest",
            where=str(path),
            fix="restore both files together from a copy; until then nothing may be released",
        )
    return records, whole, None


def _checked(path: Path, line: bytes, index: int, previous: str) -> Record:
    try:
        found = json.loads(line)
        body = {name: value for name, value in found.items() if name not in RESERVED}
        expected = linked(body, index, previous)
    except (ValueError, AttributeError):
        expected, found = {}, None
    if not isinstance(found, dict) or _line(expected) != line:
        raise PrivacyError(
            f"line {index + 1} is not what was written there: the chain of hashes breaks",
            where=str(path),
            fix="restore it from a copy; until then nothing may be released",
        )
    return expected


def _canonical(value: Record) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _line(record: Record) -> bytes:
    return _canonical(record) + b"\n"


def _last_of(path: Path) -> Path:
    return path.with_name(path.name + ".last")


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _open_private(path: Path) -> int:
    """A descriptor of the file, created readable by its owner alone."""
    found = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    mode = stat.S_IMODE(os.fstat(found).st_mode)
    if mode & 0o077:
        os.close(found)
        raise PrivacyError(f"others may read or write it (mode {mode:04o})", where=str(path), fix=f"chmod 600 {path}")
    return found


def _write(descriptor: int, data: bytes) -> None:
    """All of it; a short write goes on."""
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _replace(path: Path, data: bytes) -> None:
    """As `files.write_atomic`, readable by its owner alone, and without the libraries that module loads."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
