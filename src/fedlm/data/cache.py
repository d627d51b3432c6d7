"""One source as a memory-mapped table of canonical examples in the cache, written once per content and mapping."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from fedlm.data.examples import SCHEMAS, Example, kind_of, map_rows
from fedlm.data.packages import locked
from fedlm.data.redact import Redactor
from fedlm.data.sources import Located, read_rows
from fedlm.errors import DataError
from fedlm.files import cache_dir, read_json, write_json
from fedlm.recipe.redact import RedactSpec
from fedlm.recipe.schema import PartitionSpec

_BATCH = 1000
"""Rows per Arrow record batch."""


@dataclass(frozen=True)
class Table:
    """A source's examples: `dataset` (memory-mapped), its kind, how many malformed rows were skipped, and how often
    personal data was replaced, by kind."""

    dataset: Any
    kind: str
    malformed: int
    redacted: dict[str, int]


@cache
def _code() -> str:
    """A hash of the code that reads and maps, so that another version of it never meets its predecessor's tables."""
    here = Path(__file__).parent
    names = ("archives.py", "cache.py", "columns.py", "examples.py", "readers.py", "redact.py", "sources.py")
    files = [*(here / name for name in names), here.parent / "recipe" / "expressions.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def table_of(
    located: Located,
    malformed: str,
    partition: PartitionSpec | None,
    redact: RedactSpec | None = None,
    user: str | None = None,
) -> Table:
    """The source's examples, mapped now or read from the cache.

    Args:
        user: column or template that says whose row it is, where that is asked for.

    Raises:
        MissingExtra: personal data is to be replaced, and a library for that is not installed.
        DataError: a malformed row under 'fail', no row at all, or a cache that cannot be written.
    """
    import datasets

    source = located.source
    kind = kind_of(source.columns, source.path)
    mapping = source.model_dump(mode="json", exclude={"name", "sha256", "role", "max_rows"})
    by = None if partition is None else [partition.by, partition.pattern]
    identity = [_code(), located.identity, located.domain, mapping, malformed, by]
    if redact is not None:
        identity.append(redact.model_dump(mode="json"))
    if user is not None:
        identity.append({"user": user})
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "datasets"
    table, note = folder / f"{key}.arrow", folder / f"{key}.json"
    try:
        if not note.exists():  # the note is written last; a warm cache may be read-only
            with locked(folder / f"{key}.lock"):
                if not note.exists():
                    redactor = None if redact is None else Redactor(redact)
                    rows, domain = read_rows(located), located.domain
                    examples = map_rows(
                        rows, source, malformed, domain=domain, partition=partition, redactor=redactor, user=user
                    )
                    counts = _write(table, examples, kind, source.path)
                    write_json(note, {**counts, "redacted": {} if redactor is None else redactor.counts})
    except OSError as fault:
        raise DataError(
            f"the examples cannot be kept: {fault.strerror or fault}",
            where=str(folder),
            fix="free some space there, or set FEDLM_CACHE to a folder that can be written",
        ) from fault
    known = read_json(note)
    return Table(datasets.Dataset.from_file(str(table)), kind, int(known["malformed"]), known["redacted"])


def _write(path: Path, examples: Iterator[Example | str], kind: str, where: str) -> dict[str, int]:
    """Stream examples into an Arrow file, atomically; returns the counts of rows and malformed rows."""
    schema, counts, first_fault = SCHEMAS[kind], Counter(rows=0, malformed=0), ""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".write-")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            with pa.ipc.new_stream(handle, schema) as writer:
                batch: list[Example] = []
                for example in examples:
                    if isinstance(example, str):
                        counts["malformed"] += 1
                        first_fault = first_fault or example
                        continue
                    batch.append(example)
                    counts["rows"] += 1
                    if len(batch) == _BATCH:
                        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
                        batch = []
                if batch:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
            handle.flush()
            os.fsync(handle.fileno())
        if counts["rows"] == 0 and counts["malformed"]:
            raise DataError(
                f"all {counts['malformed']} rows are malformed, the first at {first_fault}",
                where=where,
                fix="check the recipe's columns",
            )
        if counts["rows"] == 0:
            raise DataError("the source holds no rows", where=where, fix="check its path and its `where`")
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return dict(counts)
