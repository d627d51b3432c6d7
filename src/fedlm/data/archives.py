"""Reading and extracting members of wheels and tarballs that nobody vouches for.

Refused with a `PackageError`: names that leave the folder ('../', absolute, with a drive or a NUL), links and devices,
members or archives larger than a bound, and members that inflate far beyond what text or weights ever do.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fedlm.errors import PackageError

MAX_MEMBER_BYTES = 16 << 30
MAX_ARCHIVE_BYTES = 64 << 30
"""Bound on the sum of the members' unpacked sizes."""
MAX_RATIO = 200
"""Unpacked over packed size above which a member larger than RATIO_FLOOR is taken for a bomb (deflate reaches 1030)."""
RATIO_FLOOR = 64 << 20

_BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError)


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob over '/'-separated names as a regular expression: '*' and '?' stay within a part, '**' crosses parts.

    Raises PackageError for brackets that make no sense.

    >>> bool(glob_regex("data/**/*.txt").fullmatch("data/a/b/c.txt"))
    True
    """
    out, i = "", 0
    while i < len(pattern):
        if pattern.startswith("**/", i):
            out, i = out + "(?:.*/)?", i + 3
        elif pattern.startswith("**", i):
            out, i = out + ".*", i + 2
        elif pattern[i] == "*":
            out, i = out + "[^/]*", i + 1
        elif pattern[i] == "?":
            out, i = out + "[^/]", i + 1
        elif pattern[i] == "[" and (end := pattern.find("]", i + 2)) > 0:
            inside = pattern[i + 1 : end].replace("\\", "\\\\")
            inside = "^/" + inside[1:] if inside.startswith("!") else inside.replace("^", "\\^", 1)
            out, i = f"{out}[{inside}]", end + 1
        else:
            out, i = out + re.escape(pattern[i]), i + 1
    try:
        return re.compile(out, re.DOTALL)
    except re.error as fault:
        raise PackageError(f"this is no glob: {fault.msg}", where=pattern, fix="check its brackets [...]") from None


def list_members(archive: Path) -> list[str]:
    """Names of all regular files in the archive, sorted. Raises PackageError for unsafe or broken archives."""
    with _errors(archive):
        if _is_zip(archive):
            with zipfile.ZipFile(archive) as opened:
                return sorted(info.filename for info in _zip_files(archive, opened, lambda _: False))
        with tarfile.open(archive, "r|*") as stream:
            return sorted(info.name for info in _tar_files(archive, stream, lambda _: False))


def open_members(archive: Path, pattern: str) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, stream) of every regular file whose name matches the glob, without unpacking the archive.

    A wheel's members come sorted by name, a tarball's in its own order; both depend on the file's bytes alone. A stream
    is valid until the next one is asked for.

    Raises:
        PackageError: nothing matches, or the archive is broken, unsafe or too large.
    """
    matches = glob_regex(pattern).fullmatch
    yield from _open(archive, lambda name: matches(name) is not None, pattern)


def extract_member(archive: Path, member: str, to_folder: Path) -> Path:
    """Extract one member, by exact name, to `to_folder/member`, atomically.

    Returns:
        The extracted file's path.

    Raises:
        PackageError: no such member (the nearest names are said), or an unsafe or broken archive.
    """
    _check_name(archive, member)
    target = to_folder / PurePosixPath(member)
    for name, stream in _open(archive, lambda name: name == member, member):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(to_folder.resolve()):
            raise PackageError(f"the member '{name}' would land outside its folder", where=archive.name)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=".extract-")
        try:
            with os.fdopen(descriptor, "wb") as handle:
                while block := stream.read(1 << 20):
                    handle.write(block)
                handle.flush()
                os.fsync(handle.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return target


def _open(archive: Path, wanted: Callable[[str], bool], pattern: str) -> Iterator[tuple[str, BinaryIO]]:
    matched = False
    if _is_zip(archive):
        with _errors(archive):
            opened = zipfile.ZipFile(archive)
        with opened:
            with _errors(archive):
                infos = [i for i in _zip_files(archive, opened, wanted) if wanted(i.filename)]
            for info in sorted(infos, key=lambda i: i.filename):
                with _errors(archive):
                    raw = opened.open(info)
                with raw:
                    matched = True
                    yield info.filename, _stream(raw, archive, info.filename, info.file_size)
    else:
        with _errors(archive):
            stream = tarfile.open(archive, "r|*")  # noqa: SIM115
        with stream:
            members = _tar_files(archive, stream, wanted)
            while True:
                with _errors(archive):
                    member = next(members, None)
                if member is None:
                    break
                if wanted(member.name):
                    content = stream.extractfile(member)
                    assert content is not None  # _tar_files gives regular files only
                    matched = True
                    yield member.name, _stream(content, archive, member.name, member.size)
    if not matched:
        raise PackageError(
            f"no member matches '{pattern}'", where=archive.name, fix=_hint(pattern, list_members(archive))
        )


def _hint(pattern: str, names: list[str]) -> str:
    """The nearest members, or some that exist; short even for archives with very many members."""
    near = difflib.get_close_matches(pattern, names[:5000], n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    return "members are for instance " + ", ".join(names[:: max(1, len(names) // 5)][:5])


def _zip_files(archive: Path, opened: zipfile.ZipFile, wanted: Callable[[str], bool]) -> Iterator[zipfile.ZipInfo]:
    total = 0
    for info in opened.infolist():
        _check_name(archive, info.filename)
        if info.is_dir():
            continue
        mode = info.external_attr >> 16
        if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
            if wanted(info.filename):
                raise PackageError(
                    f"the member '{info.filename}' is a link or a device, not a file", where=archive.name
                )
            continue
        total += info.file_size
        _check_size(archive, info.filename, info.file_size, info.compress_size, total)
        yield info


def _tar_files(archive: Path, stream: tarfile.TarFile, wanted: Callable[[str], bool]) -> Iterator[tarfile.TarInfo]:
    total, packed = 0, archive.stat().st_size
    for info in stream:
        _check_name(archive, info.name)
        if info.isdir():
            continue
        if not info.isreg():
            if wanted(info.name):
                raise PackageError(f"the member '{info.name}' is a link or a device, not a file", where=archive.name)
            continue
        total += info.size
        _check_size(archive, info.name, info.size, packed, total)
        yield info


def _check_name(archive: Path, name: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[0] == "/" or ".." in parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise PackageError(
            f"the archive holds the unsafe path {name!r} and is refused",
            where=archive.name,
            fix="do not use this file; tell whoever made it",
        )


def _check_size(archive: Path, name: str, size: int, packed: int, total: int) -> None:
    if size > MAX_MEMBER_BYTES or total > MAX_ARCHIVE_BYTES or (size > RATIO_FLOOR and size > MAX_RATIO * packed):
        raise PackageError(
            f"the member '{name}' unpacks to {size:,} bytes from {packed:,}, beyond what is accepted",
            where=archive.name,
            fix="do not use this file; tell whoever made it",
        )


class _Checked(io.RawIOBase):
    """A member's stream that stops at the declared size and turns faults of the archive into PackageErrors."""

    def __init__(self, raw: BinaryIO, archive: Path, name: str, size: int) -> None:
        self._raw, self._archive, self._name, self._left = raw, archive, name, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        with _errors(self._archive):
            block = self._raw.read(len(view))
        self._left -= len(block)
        if self._left < 0 or (not block and self._left):
            raise PackageError(f"the member '{self._name}' has another size than it declares", where=self._archive.name)
        view[: len(block)] = block
        return len(block)


def _stream(raw: object, archive: Path, name: str, size: int) -> BinaryIO:
    return io.BufferedReader(_Checked(raw, archive, name, size), 1 << 16)  # type: ignore[arg-type]


def _is_zip(archive: Path) -> bool:
    return archive.name.endswith((".whl", ".zip"))


@contextlib.contextmanager
def _errors(archive: Path) -> Iterator[None]:
    try:
        yield
    except _BROKEN as fault:
        if isinstance(fault, FileNotFoundError):
            raise PackageError("the archive does not exist", where=str(archive)) from fault
        raise PackageError(
            f"the archive cannot be read: {fault}", where=archive.name, fix="remove it from the cache and fetch again"
        ) from fault
