"""Encoded rows on disk are those in memory, are written once, and are written again where they are damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from fedlm.errors import DataError
from fedlm.training import stored
from fedlm.training.encode import TokenSet, encode_all
from fedlm.training.sequences import Encoded, Example
from fedlm.training.stored import NOTE, stored_tokens
from fedlm.training.tasks import get_task
from fedlm.training.tasks.base import Task

WORDS = ("the", "patient", "was", "given", "a", "dose", "of", "medicine", "bank", "lent", "money", "to", "school")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path))
    monkeypatch.setattr(stored, "SMALL", 100)
    monkeypatch.setattr(stored, "BATCH", 64)
    return tmp_path / "tokens"


@pytest.fixture
def rows() -> Any:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, size=n)) for n in draw.integers(1, 60, 40)]
    return datasets.Dataset.from_dict({"text": texts, "row": [f"a.jsonl:{n}" for n in range(40)]})


def equal(a: TokenSet, b: TokenSet) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("ids", "loss", "offsets"))
    facts = a.facts.keys() == b.facts.keys() and all(np.array_equal(a.facts[n], b.facts[n]) for n in a.facts)
    return arrays and facts and (a.dropped, a.cut, a.width) == (b.dropped, b.cut, b.width)


def test_mapped_tokens_are_those_in_memory_and_are_encoded_once(
    cache: Path, rows: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = get_task("pretrain")
    memory, mapped = encode_all(rows, task, tokenizer, 16), stored_tokens(rows, task, tokenizer, 16)
    assert equal(memory, mapped) and isinstance(mapped.ids, np.memmap) and mapped.held == 0
    assert memory.held == len(memory.ids) > 1000 and mapped.ids.dtype == np.int32
    (folder,) = [f for f in cache.iterdir() if f.is_dir()]
    assert folder.parent.stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0
    with monkeypatch.context() as patch:
        patch.setattr(stored, "encoded_rows", None)
        assert equal(memory, stored_tokens(rows, task, tokenizer, 16))
        elsewhere = rows.remove_columns("row").add_column("row", ["b.jsonl:1"] * 40)
        assert equal(memory, stored_tokens(elsewhere, task, tokenizer, 16)), "where a row stands is not its content"


def test_whatever_changes_the_tokens_changes_the_place(cache: Path, rows: Any, tokenizer: Any) -> None:
    task = get_task("pretrain")
    stored_tokens(rows, task, tokenizer, 16)
    spaced = rows.map(lambda row: {"text": row["text"].replace(" ", "  ")})
    for changed, length in (
        (rows, 17),
        (rows.select(range(39, -1, -1)), 16),
        (spaced, 16),
        (rows.select([*range(30)]), 16),
    ):
        assert equal(stored_tokens(changed, task, tokenizer, length), encode_all(changed, task, tokenizer, length))
    assert len([f for f in cache.iterdir() if f.is_dir()]) == 5


def test_few_tokens_leave_no_files(cache: Path, rows: Any, tokenizer: Any) -> None:
    task, few = get_task("pretrain"), rows.select([0, 1])
    assert equal(stored_tokens(few, task, tokenizer, 256), encode_all(few, task, tokenizer, 256))
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "lost", "note", "half"])
def test_damage_is_found_and_mended(cache: Path, rows: Any, tokenizer: Any, damage: str) -> None:
    task = get_task("pretrain")
    memory = encode_all(rows, task, tokenizer, 16)
    stored_tokens(rows, task, tokenizer, 16)
    (folder,) = [f for f in cache.iterdir() if f.is_dir()]
    ids = folder / "ids.npy"
    if damage == "flip":
        whole = bytearray(ids.read_bytes())
        whole[-7] ^= 1
        ids.write_bytes(whole)
    elif damage == "cut":
        os.truncate(ids, ids.stat().st_size - 4)
    elif damage == "lost":
        ids.unlink()
    elif damage == "note":
        (folder / NOTE).write_text("{")
    else:  # killed while writing: nothing but a folder that nobody reads
        folder.rename(folder.with_name(".write-x"))
    assert equal(stored_tokens(rows, task, tokenizer, 16), memory)
    assert equal(TokenSet.load(folder), memory)


@pytest.mark.usefixtures("cache")
def test_facts_and_several_sequences_of_an_example_are_kept(rows: Any, tokenizer: Any) -> None:
    class Pairs(Task):
        name, stored = "pairs", True

        def examples(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Example]:
            ids = np.asarray(tokenizer(row["text"])["input_ids"][:max_length], np.int32)
            if len(ids) < 8:
                return []
            one = Encoded(ids, np.arange(len(ids)) > 2, cut=True)
            return [Example((one, Encoded(ids[:6], np.arange(6) > 2)), {"length": len(ids), "half": 0.5})]

    mapped, memory = stored_tokens(rows, Pairs(), tokenizer, 64), encode_all(rows, Pairs(), tokenizer, 64)
    assert equal(mapped, memory) and mapped.width == 2 and mapped.dropped > 0 and mapped.cut > 0
    assert dict(mapped[3].facts) == dict(memory[3].facts) and mapped[3].facts["half"] == 0.5


def test_a_cache_that_cannot_be_written_is_said(cache: Path, rows: Any, tokenizer: Any) -> None:
    cache.parent.joinpath("tokens").write_text("a file")
    with pytest.raises(DataError, match=r"encoded rows cannot be kept.*FEDLM_CACHE"):
        stored_tokens(rows, get_task("pretrain"), tokenizer, 16)
