"""Formats: a stream of bytes becomes raw rows with their place, one at a time.

Faults are values, not exceptions, so that the policy for malformed rows is applied in one place.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet

from fedlm.errors import DataError

MAX_ROW_BYTES = 256 << 20
"""Longest accepted line, document or JSON file; also what stops a .gz that inflates without end."""

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


@dataclass(frozen=True)
class RawRow:
    """A row as found, or why it could not be read.

    Attributes:
        where: 'file:line', or 'file:row' for formats without lines.
        values: the row's columns; None when it could not be read.
        fault: a phrase without any of the row's text.
    """

    where: str
    values: dict[str, Any] | None
    fault: str = ""


def format_of(name: str, wanted: str = "auto") -> str | None:
    """The format of a file by its name ('.gz' aside), or the one the recipe names; None if it cannot be told."""
    if wanted != "auto":
        return wanted
    return SUFFIXES.get(PurePosixPath(name.lower().removesuffix(".gz")).suffix)


def read_stream(name: str, stream: BinaryIO, kind: str, encoding: str) -> Iterator[RawRow]:
    """Rows of one file.

    Args:
        name: how errors call the file.
        stream: its bytes; gzip if the name ends in .gz.
        kind: jsonl, json, csv, parquet or text.
        encoding: a codec's name; faults are counted per line.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    codec = _text_codec(encoding)
    if codec is None:
        raise DataError(f"there is no text encoding '{encoding}'", where=name, fix="try utf-8 or latin-1")
    if codec == "utf-8":
        encoding = "utf-8-sig"  # the same, but a byte order mark at the start is no part of the text
    elif kind in ("jsonl", "csv") and "\n{,".encode(encoding) != b"\n{,":
        raise DataError(
            f"a {kind} file in the encoding '{encoding}' cannot be read line by line",
            where=name,
            fix="convert it to UTF-8",
        )
    try:
        if name.lower().endswith(".gz"):
            stream = gzip.GzipFile(fileobj=stream)  # type: ignore[assignment]
        yield from _READERS[kind](name, stream, encoding)
    except (zlib.error, EOFError, OSError, pa.ArrowException) as fault:
        raise DataError(f"the file cannot be read as {kind}: {_phrase(fault)}", where=name) from fault


def _text_codec(encoding: str) -> str | None:
    """The codec's own name, e.g. 'utf-8' for 'U8'; None if there is none, or it is none for the text of files."""
    try:
        codec = codecs.lookup(encoding)
    except (LookupError, ValueError):
        return None
    return codec.name if codec._is_text_encoding and codec.name not in ("idna", "punycode", "undefined") else None


def _phrase(fault: Exception) -> str:
    return f"{type(fault).__name__} (broken or cut file?)"


def _decode_fault(fault: UnicodeDecodeError, encoding: str) -> str:
    shown = "UTF-8" if encoding == "utf-8-sig" else encoding
    return (
        f"byte 0x{fault.object[fault.start]:02x} is not {shown}; if the file has another encoding, "
        "name it in the source, e.g. encoding: latin-1"
    )


def _whole(name: str, stream: BinaryIO) -> bytes:
    data = stream.read(MAX_ROW_BYTES + 1)
    if len(data) > MAX_ROW_BYTES:
        raise DataError(f"the file is longer than {MAX_ROW_BYTES:,} bytes", where=name, fix="use JSONL or Parquet")
    return data


def _lines(name: str, stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    buffered = io.BufferedReader(stream) if isinstance(stream, io.RawIOBase) else stream
    while line := buffered.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise DataError(f"the line is longer than {MAX_ROW_BYTES:,} bytes", where=f"{name}:{number}")
        yield number, line


def _jsonl(name: str, stream: BinaryIO, encoding: str) -> Iterator[RawRow]:
    later = "utf-8" if encoding == "utf-8-sig" else encoding
    for number, line in _lines(name, stream):
        where = f"{name}:{number}"
        try:
            text = line.decode(encoding if number == 1 else later)
            if not text.strip():
                continue
            value = json.loads(text)
        except UnicodeDecodeError as fault:
            yield RawRow(where, None, _decode_fault(fault, encoding))
        except json.JSONDecodeError as fault:
            yield RawRow(where, None, f"this is not JSON: {fault.msg} at column {fault.colno}")
        except (ValueError, RecursionError):
            yield RawRow(where, None, "this JSON has numbers too long or nesting too deep")
        else:
            yield _record(where, value)


def _record(where: str, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(where, value)
    return RawRow(where, None, f"the row is a JSON {type(value).__name__}, not a record {{...}}")


def _json(name: str, stream: BinaryIO, encoding: str) -> Iterator[RawRow]:
    data = _whole(name, stream)
    try:
        value = json.loads(data.decode(encoding))
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        raise DataError(_decode_fault(fault, encoding), where=f"{name}:{line}") from None
    except json.JSONDecodeError as fault:
        raise DataError(
            f"this is not JSON: {fault.msg} at column {fault.colno}",
            where=f"{name}:{fault.lineno}",
            fix="if each line is a record of its own, set format: jsonl",
        ) from None
    except (ValueError, RecursionError):
        raise DataError("this JSON has numbers too long or nesting too deep", where=name) from None
    if isinstance(value, dict):
        lists = [value[key] for key in ("data", "records", "rows", "examples") if isinstance(value.get(key), list)]
        value = lists[0] if len(lists) == 1 else [value]  # a file may be one record
    if not isinstance(value, list):
        raise DataError("a JSON file must hold a record or a list of records", where=name)
    for number, item in enumerate(value, 1):
        yield _record(f"{name}:{number}", item)


def _csv(name: str, stream: BinaryIO, encoding: str) -> Iterator[RawRow]:
    faults: dict[int, str] = {}
    later = "utf-8" if encoding == "utf-8-sig" else encoding

    def text_lines() -> Iterator[str]:
        for number, line in _lines(name, stream):
            codec = encoding if number == 1 else later
            try:
                yield line.decode(codec)
            except UnicodeDecodeError as fault:
                faults[number] = _decode_fault(fault, encoding)
                yield line.decode(codec, errors="replace")

    csv.field_size_limit(MAX_ROW_BYTES)
    tabs = name.lower().removesuffix(".gz").endswith(".tsv")
    reader = csv.reader(text_lines(), delimiter="\t" if tabs else ",", strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if faults or len(set(header)) != len(header) or not all(header):
            reason = next(iter(faults.values()), "every column of the header needs a name of its own")
            raise DataError(reason, where=f"{name}:1")
        while True:
            first = reader.line_num + 1
            fields = next(reader, None)
            if fields is None:
                return
            if not fields:
                continue
            where, bad = f"{name}:{first}", [faults[n] for n in range(first, reader.line_num + 1) if n in faults]
            if bad:
                yield RawRow(where, None, bad[0])
            elif len(fields) != len(header):
                yield RawRow(where, None, f"the row has {len(fields)} fields, the header {len(header)}")
            else:
                yield RawRow(where, dict(zip(header, fields, strict=True)))
    except csv.Error as fault:
        raise DataError(
            f"this is not CSV: {fault}", where=f"{name}:{reader.line_num}", fix="check the quotes"
        ) from None


def _parquet(name: str, stream: BinaryIO, encoding: str) -> Iterator[RawRow]:
    del encoding
    seekable = stream if stream.seekable() else pa.BufferReader(stream.read())
    number = 0
    for batch in pyarrow.parquet.ParquetFile(seekable).iter_batches(batch_size=1000):
        for values in batch.to_pylist():
            number += 1
            yield RawRow(f"{name}:{number}", values)


def _text(name: str, stream: BinaryIO, encoding: str) -> Iterator[RawRow]:
    data = _whole(name, stream)
    path = PurePosixPath(name.removesuffix(".gz").replace("!", "/"))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        yield RawRow(f"{name}:{line}", None, _decode_fault(fault, encoding))
        return
    if "\0" in text:
        yield RawRow(f"{name}:1", None, "the file holds NUL characters; is it text?")
        return
    yield RawRow(f"{name}:1", {"text": text, "file": path.stem, "folder": path.parent.name})


_READERS: dict[str, Callable[[str, BinaryIO, str], Iterator[RawRow]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "text": _text,
}
