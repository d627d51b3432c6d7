"""Every format gives the same rows, and every fault in a file is said with its file and line, never with its text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from fedlm.data.federated import FederatedData
from fedlm.errors import DataError

Load = Callable[..., FederatedData]
ROWS = [{"text": f'Überschrift {i}, "quoted"\nsecond line', "label": "ab"[i % 2]} for i in range(30)]
TEXT = {"text": "text", "label": "label"}
SECRET = "SECRETWORD"
CUT_GZIP = gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:40]


def write_all_formats(folder: Path) -> dict[str, Path]:
    import csv

    lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in ROWS)
    (folder / "a.jsonl").write_text(lines)
    (folder / "bom.jsonl").write_text("\ufeff" + lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    (folder / "a.json").write_text(json.dumps(ROWS))
    (folder / "b.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (folder / name).open("w", newline="", encoding="utf-8-sig") as handle:
            writer = csv.DictWriter(handle, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet")
    return {p.name: p for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    "name", ["a.jsonl", "bom.jsonl", "a.jsonl.gz", "a.json", "b.json", "a.csv", "a.tsv", "a.parquet"]
)
def test_formats_agree(tmp_path: Path, load: Load, name: str) -> None:
    write_all_formats(tmp_path)
    pooled = load([{"path": name, "columns": TEXT}], split={"validation": 0, "test": 0}).pooled()
    assert pooled.train["text"][:] == [r["text"] for r in ROWS]
    assert pooled.train["label"][:] == [r["label"] for r in ROWS]


def test_text_files_in_folders(tmp_path: Path, load: Load) -> None:
    for folder in ("sport", "tech"):
        for i in range(5):
            path = tmp_path / "news" / folder / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{folder} article {i}")
    columns = {"question": "{text:.5}?", "choices": ["sport", "tech"], "answer": "folder"}
    for path in ("news", "news/*/*.txt", "news/**/*.txt"):
        data = load([{"path": path, "columns": columns}], split={"validation": 0, "test": 0})
        rows = data.pooled().train
        assert sorted(rows["row"][:])[0] == "news/sport/0.txt:1"
        assert {(r["choices"][r["answer"]], r["label"]) for r in rows} == {("sport", "sport"), ("tech", "tech")}
        assert rows[0]["question"] == "sport?"


def test_hub_dataset_is_pinned_and_runs_no_code(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def stand_in(name: str, subset: str | None, **options: Any) -> Any:
        asked.update(options, name=name, subset=subset)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    source = {"path": "hub:owner/name", "columns": TEXT}
    with pytest.raises(DataError, match="revision"):
        load([source])
    data = load([{**source, "revision": "abc", "subset": "en", "hub_split": "validation"}])
    assert asked == {"name": "owner/name", "subset": "en", "split": "validation", "revision": "abc"}
    assert data.pooled().train[0]["domain"] == "name"


def test_hub_dataset_out_of_reach(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError, match=r"hub:owner/name.*Couldn't reach"):
        load([{"path": "hub:owner/name", "revision": "abc", "columns": TEXT}])


BAD_FILES: list[tuple[str, bytes, str]] = [
    ("a.jsonl", b'{"text": "ok"}\n{"text": "' + SECRET.encode() + b'", }\n', r"a\.jsonl:2: this is not JSON"),
    ("a.jsonl", b'{"text": "ok"}\n["' + SECRET.encode() + b'"]\n', r"a\.jsonl:2: the row is a JSON list"),
    (
        "a.jsonl",
        b'{"text": "ok"}\n{"text": "' + SECRET.encode() + b'\xa3"}\n',
        r"a\.jsonl:2: byte 0xa3 is not UTF-8.*latin-1",
    ),
    ("a.jsonl", b'{"text": "ok"}\n{"text": "' + SECRET.encode() + b'\\ud800"}\n', r"a\.jsonl:2: .*surrogate"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": ' + b"[" * 100_000 + b"}\n", r"a\.jsonl:2: this"),
    ("a.csv", b"text\nok\n" + SECRET.encode() + b"\xff\n", r"a\.csv:3: byte 0xff is not UTF-8"),
    ("a.csv", b'text,n\n"a\nb",1\n' + SECRET.encode() + b"\n", r"a\.csv:4: the row has 1 fields, the header 2"),
    ("d/a.txt", b"line\n" + SECRET.encode() + b"\nthird \xa3", r"d/a\.txt:3: byte 0xa3 is not UTF-8"),
    ("d/a.txt", b"\0" + SECRET.encode(), r"d/a\.txt:1: the file holds NUL"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_rows_fail_with_place_or_are_counted(
    tmp_path: Path, load: Load, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    sources = [{"path": p, "columns": {"text": "text"}} for p in (name, "good.jsonl")]
    with pytest.raises(DataError, match=message) as caught:
        load(sources)
    assert SECRET not in str(caught.value)
    if name.endswith(".txt"):
        (path.parent / "b.txt").write_text("fine")
        sources[0]["path"] = "d"
    data = load(sources, malformed="skip", split={"validation": 0, "test": 0})
    assert data.skipped == {"malformed": 1}
    assert SECRET not in str(data.pooled().train["text"][:])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "' + SECRET.encode() + b'"},\n}]', r"a\.json:2: this is not JSON.*jsonl"),
        ("a.json", b"3", "a record or a list of records"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: every column"),
        ("a.csv", b'text\n"never closed\n', r"a\.csv:2: this is not CSV"),
        ("a.parquet", b"PAR1" + SECRET.encode(), r"a\.parquet: the file cannot be read as parquet"),
        ("a.jsonl.gz", CUT_GZIP, r"a\.jsonl\.gz: the file cannot be read"),
        ("a.jsonl", b"", r"a\.jsonl: the source holds no rows"),
        ("a.bin", b"x", r"a\.bin: the file's ending"),
    ],
)
def test_bad_files_fail_under_either_policy(
    tmp_path: Path, load: Load, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for policy in ("fail", "skip"):
        with pytest.raises(DataError, match=message) as caught:
            load([{"path": name, "columns": {"text": "text"}}], malformed=policy)
        assert SECRET not in str(caught.value)


def test_missing_file_says_what_is_there(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl(ROWS, "data/hospital.jsonl")
    with pytest.raises(DataError, match=r"hopsital\.jsonl: there is no such file.*hospital\.jsonl"):
        load([{"path": "data/hopsital.jsonl", "columns": TEXT}])
    with pytest.raises(DataError, match="does not exist either"):
        load([{"path": "nowhere/a.jsonl", "columns": TEXT}])
    with pytest.raises(DataError, match="no file matches"):
        load([{"path": "data/*.csv", "columns": TEXT}])


def test_encodings(tmp_path: Path, load: Load) -> None:
    (tmp_path / "a.csv").write_bytes("text\n£ and é\n".encode("latin-1"))
    whole = {"validation": 0, "test": 0}
    data = load([{"path": "a.csv", "columns": {"text": "text"}, "encoding": "latin-1"}], split=whole)
    assert data.pooled().train["text"][:] == ["£ and é"]
    (tmp_path / "a.txt").write_bytes("£ and é\n".encode("utf-16"))
    data = load([{"path": "a.txt", "columns": {"text": "text"}, "encoding": "utf-16"}], split=whole)
    assert data.pooled().train["text"][:] == ["£ and é\n"]
    with pytest.raises(DataError, match="line by line"):
        load([{"path": "a.csv", "columns": {"text": "text"}, "encoding": "utf-16"}])
    for name in ("klingon", "rot13", "base64", "idna", "undefined", ""):
        with pytest.raises(DataError, match=f"no text encoding '{name}'"):
            load([{"path": "a.csv", "columns": {"text": "text"}, "encoding": name}])


@pytest.mark.parametrize(
    ("path", "words"),
    [("d/**x.jsonl", "Invalid pattern"), ("~nouser/x.jsonl", "home directory"), ("x" * 300, "name too long")],
)
def test_paths_that_no_machine_knows(load: Load, path: str, words: str) -> None:
    with pytest.raises(DataError, match=f"this path cannot be used: .*{words}"):
        load([{"path": path, "columns": TEXT}])
