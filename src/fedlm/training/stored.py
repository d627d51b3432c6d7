"""Encoded rows of a large corpus on disk: written once, row after row, and memory-mapped by every process.

A set lies in `cache_dir()/tokens/<key>`, where the key is a hash of all that its tokens depend on: the rows in their
order, the tokenizer, the task, `max_length`, and the code that encodes. A folder appears complete or not at all, and
says the SHA-256 of each file; where one does not match, the set is written anew. Like the mapped rows beside it in the
cache, it holds a silo's text in the clear, readable by its owner alone.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fedlm.data.packages import locked
from fedlm.errors import DataError
from fedlm.files import cache_dir, sha256_file, sync_folder
from fedlm.models.fingerprint import tokenizer_hash
from fedlm.training import encode, sequences
from fedlm.training.encode import Tally, TokenSet, encoded_rows
from fedlm.training.sequences import Example
from fedlm.training.tasks.base import Task

SMALL = 1 << 20
"""Tokens up to which a set stays in memory (5 MB): encoding it again takes a second."""

BATCH = 1 << 16
"""Tokens that are appended to the files at a time."""

NOTE = "counts.json"


def stored_tokens(rows: Any, task: Task, tokenizer: Any, max_length: int, *, skip: bool = False) -> TokenSet:
    """What `encode_all` gives: from memory for few tokens, else mapped from the cache, where it is written first if it
    is not there or damaged. Memory while writing does not grow with the rows.

    Args:
        rows: a `datasets.Dataset` of canonical rows.

    Raises:
        DataError, ModelError: as `encode_all`; also a cache that cannot be written.
    """
    folder = cache_dir() / "tokens" / _key(rows, task, tokenizer, max_length, skip)
    try:
        if (found := _opened(folder)) is not None:
            return found
        tally = Tally()
        examples = encoded_rows(rows, task, tokenizer, max_length, skip=skip, tally=tally)
        few, more = _first(examples, SMALL)
        if not more:
            return TokenSet.of(few, tally.dropped, tally.cut)
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock")):
            if (found := _opened(folder)) is None:
                _write(folder, chain(few, examples), tally)
                found = _opened(folder)
    except OSError as fault:
        raise DataError(
            f"the encoded rows cannot be kept: {fault.strerror or fault}",
            where=str(folder.parent),
            fix="free some space there, or set FEDLM_CACHE to a folder that can be written",
        ) from fault
    if found is None:
        raise DataError("the encoded rows are damaged once written", where=str(folder), fix="check the disk")
    return found


def _code(task: type[Task]) -> str:
    """A hash of the code that encodes."""
    involved: list[Any] = [encode, sequences, *(of for of in task.__mro__ if issubclass(of, Task))]
    files = {inspect.getfile(of) for of in involved}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(files))).hexdigest()


def _key(rows: Any, task: Task, tokenizer: Any, max_length: int, skip: bool) -> str:
    """Rows' own hashes leave out white space, so their text is read here."""
    state = hashlib.sha256()
    for batch in rows.iter(64):
        state.update(json.dumps({name: values for name, values in batch.items() if name != "row"}).encode())
    identity = [_code(type(task)), state.hexdigest(), tokenizer_hash(tokenizer), task.name, max_length, skip]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _first(examples: Iterator[Example], limit: int) -> tuple[list[Example], bool]:
    """Examples until there are more than `limit` tokens, and whether there may be others."""
    found, tokens = [], 0
    for example in examples:
        found.append(example)
        tokens += len(example)
        if tokens > limit:
            return found, True
    return found, False


def _opened(folder: Path) -> TokenSet | None:
    """The set in this folder; None where there is none or its files are not those that were written."""
    try:
        hashes = json.loads((folder / NOTE).read_text())["sha256"]
        if any(sha256_file(folder / name) != told for name, told in hashes.items()):
            return None
        return TokenSet.load(folder)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(folder: Path, examples: Iterable[Example], tally: Tally) -> None:
    """Write a set beside its place, in the form of `TokenSet.save`, and move it there."""
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".write-"))
    try:
        facts, width = _append(temporary, examples)
        hashes = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        counts = {"dropped": tally.dropped, "cut": tally.cut, "width": width, "facts": facts}
        with (temporary / NOTE).open("w") as note:
            json.dump({**counts, "sha256": hashes}, note)
            note.flush()
            os.fsync(note.fileno())
        if folder.exists():
            shutil.rmtree(folder)  # damaged
        temporary.replace(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _append(folder: Path, examples: Iterable[Example]) -> tuple[list[str], int]:
    """Write the arrays; gives the facts' names and the sequences of an example."""
    facts: list[str] = []
    width, end = 1, 0
    with ExitStack() as stack:

        def column(name: str, dtype: DTypeLike) -> _Column:
            return stack.enter_context(_Column(folder / f"{name}.npy", dtype))

        ids, loss, offsets = column("ids", np.int32), column("loss", np.bool_), column("offsets", np.int64)
        offsets.append(np.zeros(1, np.int64))
        by_fact: dict[str, _Column] = {}
        for batch in _batches(examples):
            if end == 0:
                width, facts = len(batch[0].sequences), sorted(batch[0].facts)
                by_fact = {name: column(f"fact-{name}", np.float32) for name in facts}
            found = [sequence for example in batch for sequence in example.sequences]
            ends = end + np.cumsum([len(sequence) for sequence in found], dtype=np.int64)
            end = int(ends[-1])
            ids.append(np.concatenate([sequence.ids for sequence in found]))
            loss.append(np.concatenate([sequence.loss for sequence in found]))
            offsets.append(ends)
            for name, values in by_fact.items():
                values.append(np.array([example.facts[name] for example in batch]))
    return facts, width


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    tokens = 0
    for example in examples:
        batch.append(example)
        tokens += len(example)
        if tokens >= BATCH:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


class _Column:
    """A one-dimensional .npy file that grows: its header leaves room for any length and is written again at the end."""

    def __init__(self, path: Path, dtype: DTypeLike) -> None:
        self.dtype, self.count, self.file = np.dtype(dtype), 0, path.open("wb")
        self._header()

    def append(self, values: NDArray[Any]) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).data)
        self.count += len(values)

    def _header(self) -> None:
        shape = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self.file, shape)

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *error: object) -> None:
        with self.file:
            self.file.seek(0)
            self._header()
            self.file.flush()
            os.fsync(self.file.fileno())
