"""Where rows come from: files, folders, globs, hub datasets, members of registry packages.

`locate` says what a source consists of and identifies its exact content (for the cache) without reading it; `read_rows`
streams the rows. Nothing is held in memory but the row at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.data.columns import MalformedRowError, look_up
from fedlm.data.packages import fetch, is_package, open_members, parse_source
from fedlm.data.readers import SUFFIXES, RawRow, format_of, read_stream
from fedlm.errors import DataError
from fedlm.recipe.schema import SourceSpec

_GLOB = "*?["


@dataclass(frozen=True)
class Located:
    """A source found: `files` on disk, or a package's `archive`, or a hub dataset (neither)."""

    source: SourceSpec
    identity: str
    """Changes whenever the source's content may have changed."""
    domain: str
    files: tuple[tuple[str, Path], ...] = ()
    archive: Path | None = None


def locate(source: SourceSpec, base: Path) -> Located:
    """Find a source; fetch it if it is a package. Paths are relative to `base`, the recipe's folder.

    Raises:
        DataError: nothing is there, or a hub source without a revision.
        PackageError: the package cannot be fetched or verified.
    """
    if is_package(source.path):
        package = parse_source(source.path)
        if package.member is None:
            raise DataError(
                "the source does not say which of the package's members hold the rows",
                where=source.path,
                fix=f"write '{package.package}!path/in/package/*.jsonl'",
            )
        archive = fetch(source.path, source.sha256)
        return Located(source, f"sha256 {source.sha256}", source.name or _slug(package.name), archive=archive)
    if source.path.startswith("hub:"):
        if source.revision is None:
            raise DataError(
                "a hub dataset needs `revision`, the commit that pins its content",
                where=source.path,
                fix="copy the commit's hash from the dataset's page",
            )
        domain = source.name or _slug(source.path.rsplit("/", 1)[-1].removeprefix("hub:"))
        return Located(source, f"hub {source.revision} {source.subset} {source.hub_split}", domain)
    files = _files(source, base)
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for _, path in files]
    identity = "files " + hashlib.sha256(json.dumps(states).encode()).hexdigest()
    default = Path(source.path).name.split(".")[0] if not any(c in source.path for c in _GLOB) else ""
    domain = source.name or _slug(default or files[0][1].parent.name or "data")
    return Located(source, identity, domain, files=tuple(files))


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text).strip("-._")[:64] or "data"


def _files(source: SourceSpec, base: Path) -> list[tuple[str, Path]]:
    try:
        return _found_files(source, base)
    except (OSError, RuntimeError, ValueError) as fault:  # a name too long, an unknown ~user, a glob with '**x'
        reason = (fault.strerror if isinstance(fault, OSError) else str(fault)) or type(fault).__name__
        raise DataError(f"this path cannot be used: {reason}", where=source.path, fix="correct the path") from fault


def _found_files(source: SourceSpec, base: Path) -> list[tuple[str, Path]]:
    path = Path(source.path).expanduser()
    whole = path if path.is_absolute() else base / path
    if whole.is_file():
        found = [whole]
    elif whole.is_dir():
        found = [p for p in whole.rglob("*") if p.is_file() and not p.name.startswith(".")]
        if source.format == "auto":
            found = [p for p in found if format_of(p.name)]
    elif any(c in source.path for c in _GLOB):
        root = Path(path.anchor) if path.is_absolute() else base
        found = [p for p in root.glob(str(path.relative_to(path.anchor))) if p.is_file()]
    else:
        raise DataError(
            "there is no such file or folder",
            where=str(whole),
            fix="paths are relative to the recipe's folder" + _neighbours(whole),
        )
    if not found:
        raise DataError(
            "no file matches", where=str(whole), fix=f"known endings: {', '.join(SUFFIXES)}, each also with .gz"
        )
    return [(str(p.relative_to(base)) if p.is_relative_to(base) else str(p), p) for p in sorted(found)]


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    return f"; {path.parent} holds {', '.join(names[:8]) or 'nothing'}{' ...' if len(names) > 8 else ''}"


def read_rows(located: Located) -> Iterator[RawRow]:
    """Stream a source's rows that pass `where` and `unique_by`, in a fixed order; unreadable rows come as faults.

    Raises:
        DataError: a file as a whole cannot be read.
    """
    source = located.source
    seen: set[str] = set()
    for raw in _all_rows(located):
        if raw.values is None:
            yield raw
            continue
        try:
            if not all(_is(look_up(raw.values, name), wanted) for name, wanted in source.where.items()):
                continue
            if source.unique_by is not None:
                value = json.dumps(look_up(raw.values, source.unique_by), sort_keys=True, default=str)
                if value in seen:
                    continue
                seen.add(value)
        except MalformedRowError as fault:
            yield RawRow(raw.where, None, str(fault))
            continue
        yield raw


def _is(value: Any, wanted: Any) -> bool:
    """Whether a value is the wanted one or one of them; text compares with numbers and booleans as CSV writes them."""
    options = wanted if isinstance(wanted, list) else [wanted]
    return any(_plain(value) == _plain(option) for option in options)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if value is None or isinstance(value, str | int | float) else repr(value)


def _all_rows(located: Located) -> Iterator[RawRow]:
    source = located.source
    if located.archive is not None:
        package = parse_source(source.path)
        assert package.member is not None
        for member, stream in open_members(located.archive, package.member):
            name = f"{package.name}-{package.version}!{member}"
            yield from read_stream(name, stream, _format(name, source), source.encoding)
    elif located.files:
        for name, path in located.files:
            kind = _format(name, source)
            try:
                handle = path.open("rb")
            except OSError as fault:
                raise DataError(f"the file cannot be opened: {fault.strerror}", where=name) from fault
            with handle:
                yield from read_stream(name, handle, kind, source.encoding)
    else:
        yield from _hub_rows(source)


def _format(name: str, source: SourceSpec) -> str:
    kind = format_of(name, source.format)
    if kind is None:
        raise DataError(
            "the file's ending does not tell its format",
            where=name,
            fix="set `format` to jsonl, json, csv, parquet or text",
        )
    return kind


def _hub_rows(source: SourceSpec) -> Iterator[RawRow]:
    import datasets

    name = source.path.removeprefix("hub:")
    try:
        rows = datasets.load_dataset(name, source.subset, split=source.hub_split, revision=source.revision)
    except Exception as fault:  # the library raises many kinds; its text is about the repository, not its rows
        reason = str(fault).strip().splitlines()
        raise DataError(
            f"the hub dataset cannot be loaded: {reason[0] if reason else type(fault).__name__}",
            where=source.path,
            fix="check the name, revision, subset and split; without a network it must be in the library's cache "
            "already; datasets that need a script are not run",
        ) from fault
    for number, values in enumerate(rows, 1):
        yield RawRow(f"{name}:{number}", values)
