"""Silos' rows: nothing leaks to test whatever the options, small silos are answered well, 10,000 are cheap."""

from __future__ import annotations

import errno
import json
import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.data import cache
from fedlm.data.federated import FederatedData, load_data
from fedlm.errors import DataError
from fedlm.recipe.schema import DataSpec

Load = Callable[..., FederatedData]
TEXT = {"text": "text", "label": "label"}


def hashes(data: FederatedData, role: str) -> list[str]:
    return [h for name in data.names for h in getattr(data.silo(name), role)["hash"][:]]


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet", "quantity", "shards", "domain", "natural", "named"]),
    distinct=st.integers(20, 60),
    roles=st.lists(st.sampled_from(["split", "split", "train", "validation", "test"]), min_size=1, max_size=4),
    split=st.tuples(st.sampled_from([0.0, 0.1, 0.4]), st.sampled_from([0.0, 0.1, 0.4])),
    max_rows=st.sampled_from([None, 15]),
    seed=st.integers(0, 3),
)
def test_no_test_row_in_training(
    kind: str, distinct: int, roles: list[str], split: tuple[float, float], max_rows: int | None, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = []
        for s, role in enumerate(roles):
            lines = [{"text": f"row {i}" + " " * (i % 2), "label": "abc"[i % 3]} for i in range(s, distinct)] * 2
            (folder / f"{s}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            sources.append({"path": f"{s}.jsonl", "columns": TEXT, "role": role, "max_rows": max_rows})
        data: dict[str, Any] = {"split": {"validation": split[0], "test": split[1]}}
        if kind == "named":
            data["silos"] = [{"name": f"s{i}", "sources": [source]} for i, source in enumerate(sources)]
        else:
            options = {"by": "label"} if kind == "natural" else {} if kind == "domain" else {"silos": 3}
            data |= {"sources": sources, "partition": {"kind": kind, "min_rows": 1, "alpha": 0.3, **options}}
        recipe: Any = SimpleNamespace(task="instruct", data=DataSpec.model_validate(data), seed=seed, privacy=None)
        try:
            federated = load_data(recipe, folder)
        except DataError as fault:  # too few training rows left: said, never an empty silo
            assert "training row" in str(fault) or "no rows" in str(fault)
            return
        train, validation, test = (set(hashes(federated, role)) for role in ("train", "validation", "test"))
        assert train
        assert not train & test
        assert not train & validation
        assert not validation & test
        total = sum(len(hashes(federated, role)) for role in ("train", "validation", "test"))
        used = sum(min(max_rows or 10**9, 2 * (distinct - s)) for s in range(len(roles)))
        assert total + sum(n for reason, n in federated.skipped.items() if reason != "malformed") == used
        pooled = federated.pooled()
        assert sorted(pooled.train["hash"][:]) == sorted(hashes(federated, "train"))
        assert sorted(pooled.test["hash"][:]) == sorted(hashes(federated, "test"))


def test_held_out_sources_win(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": f"row {i}", "label": "x"} for i in range(10)], "train.jsonl")
    jsonl([{"text": f"row {i}", "label": "x"} for i in range(7, 12)], "test.jsonl")
    data = load(
        [
            {"path": "train.jsonl", "role": "train", "columns": TEXT},
            {"path": "test.jsonl", "role": "test", "columns": TEXT},
        ]
    )
    assert data.skipped == {"in held-out data": 3}
    assert (len(hashes(data, "train")), len(hashes(data, "test"))) == (7, 5)


def test_split_follows_shares_and_content(load: Load, jsonl: Callable[..., Path]) -> None:
    rows = [{"text": f"row {i}", "label": "x"} for i in range(4000)]
    jsonl(rows, "a.jsonl")
    jsonl(rows[::-1], "b.jsonl")
    split = {"validation": 0.1, "test": 0.2}
    first, second = (load([{"path": p, "columns": TEXT}], split=split).pooled() for p in ("a.jsonl", "b.jsonl"))
    assert set(first.test["hash"][:]) == set(second.test["hash"][:])
    assert abs(len(first.test) / 4000 - 0.2) < 0.02
    assert abs(len(first.validation) / 4000 - 0.1) < 0.02
    other = load([{"path": "a.jsonl", "columns": TEXT}], split=split, seed=1).pooled()
    assert set(first.test["hash"][:]) != set(other.test["hash"][:])


def test_a_seed_of_the_data_holds_against_the_runs(load: Load, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    jsonl([{"text": f"row {i}", "label": "x"} for i in range(200)], "a.jsonl")
    source = [{"path": "a.jsonl", "columns": TEXT, "max_rows": 100}]
    dealt: dict[str, Any] = {"partition": {"kind": "iid", "silos": 3}, "split": {"validation": 0.2, "test": 0.2}}
    zero, one = (load(source, seed=seed, **dealt).fingerprint for seed in (0, 1))
    data = DataSpec.model_validate({**dealt, "sources": source, "seed": 0})
    fixed: Any = SimpleNamespace(task="instruct", data=data, seed=1, privacy=None)
    assert load_data(fixed, tmp_path).fingerprint == zero != one


def silo(name: str, path: str, **source: Any) -> dict[str, Any]:
    return {"name": name, "sources": [{"path": path, "columns": TEXT, **source}]}


def test_named_silos_keep_their_rows(load: Load, jsonl: Callable[..., Path]) -> None:
    for name in ("b", "a"):
        jsonl([{"text": f"{name} {i}", "label": name} for i in range(20)], f"{name}.jsonl")
    data = load(silos=[silo("b", "b.jsonl"), silo("a", "a.jsonl")])
    assert data.names == ["a", "b"]
    for name in data.names:
        rows = data.silo(name)
        assert {t[0] for part in (rows.train, rows.validation, rows.test) for t in part["text"][:]} == {name}
    card = data.card("a")
    assert sum(card["rows"].values()) == 20
    assert card["labels"] == {"a": 20}
    with pytest.raises(DataError, match="no silo 'c'"):
        data.silo("c")


def test_empty_silo(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([], "empty.jsonl")
    with pytest.raises(DataError, match=r"empty\.jsonl: the source holds no rows"):
        load(silos=[silo("a", "empty.jsonl")])


def test_silo_whose_rows_are_all_another_silos_test_rows(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": "same", "label": "x"}], "a.jsonl")
    jsonl([{"text": "same", "label": "x"}], "b.jsonl")
    with pytest.raises(DataError, match="silo 'a': the silo holds no rows"):
        load(silos=[silo("a", "a.jsonl", role="train"), silo("b", "b.jsonl", role="test")])


def test_silo_with_one_row(load: Load, jsonl: Callable[..., Path]) -> None:
    """The one row trains if its hash says so; if not, the sentence names the silo. It never moves to the wrong side."""
    seen = set()
    for i in range(12):
        jsonl([{"text": f"only {i}", "label": "x"}], "one.jsonl")
        try:
            data = load(silos=[silo("tiny", "one.jsonl")], split={"validation": 0.3, "test": 0.3})
        except DataError as fault:
            assert "silo 'tiny': the silo has no training row: its 1 row(s) are held out" in str(fault)
            assert "role: train" in str(fault) and "min_rows" not in str(fault)  # what a named silo can do
            seen.add("refused")
        else:
            assert data.card("tiny")["rows"] == {"train": 1, "validation": 0, "test": 0}
            seen.add("served")
    assert seen == {"refused", "served"}
    one = load(silos=[silo("tiny", "one.jsonl")], split={"validation": 0, "test": 0})
    assert len(one.silo("tiny").train) == 1
    one = load(silos=[silo("tiny", "one.jsonl", role="train")], split={"validation": 0.3, "test": 0.3})
    assert len(one.silo("tiny").train) == 1


def test_domains_of_the_same_name_are_never_merged(load: Load, jsonl: Callable[..., Path]) -> None:
    for name in "ab":
        jsonl([{"text": f"{name} {i}", "label": name} for i in range(20)], f"{name}/data.jsonl")
    sources = [{"path": f"{name}/data.jsonl", "columns": TEXT} for name in "ab"]
    domain = {"kind": "domain"}
    with pytest.raises(DataError, match=r"'data': a/data\.jsonl and b/data\.jsonl.*`name`"):
        load(sources, partition=domain)
    assert len(load(sources).names) == 1
    named = [{**source, "name": f"from-{name}"} for source, name in zip(sources, "ab", strict=True)]
    assert load(named, partition=domain).names == ["from-a", "from-b"]
    held_out = load([sources[0], {**sources[1], "role": "test"}], partition=domain)
    assert held_out.names == ["data"] and set(hashes(held_out, "test"))


def test_natural_by_pattern_and_its_faults(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": f"row {i}", "doc": {"id": f"{'MCAS' if i % 3 else 'AIMS'}_{i}"}} for i in range(60)])
    source = {"path": "rows.jsonl", "columns": {"text": "text"}}
    partition = {"kind": "natural", "by": "doc.id", "pattern": "^([A-Z]+)_"}
    assert load([source], partition=partition).names == ["AIMS", "MCAS"]
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'doc.id' does not match"):
        load([source], partition={**partition, "pattern": "^([0-9]+)"})
    with pytest.raises(DataError, match="regular expression"):
        load([source], partition={**partition, "pattern": "("})
    with pytest.raises(DataError, match=r"no column 'doc\.di'"):
        load([source], partition={**partition, "by": "doc.di"})


def test_dirichlet_by_a_raw_column_shows_it_in_the_card(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": f"row {i}", "topic": "xyz"[i % 3]} for i in range(300)])
    data = load(
        [{"path": "rows.jsonl", "columns": {"text": "text"}}],
        partition={"kind": "dirichlet", "by": "topic", "silos": 3},
    )
    totals = dict.fromkeys("xyz", 0)
    for name in data.names:
        for label, n in data.card(name)["labels"].items():
            totals[label] += n
    assert totals == {"x": 100, "y": 100, "z": 100}


def test_cards_never_show_answers_text(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"q": f"q{i}", "c": [f"SECRET {i}", "no"], "a": 0, "board": "b"} for i in range(20)])
    columns = {"question": "q", "choices": "c", "answer": "a"}
    for partition in ({"kind": "iid", "silos": 1}, {"kind": "natural", "by": "board"}):
        data = load([{"path": "rows.jsonl", "columns": columns}], partition=partition)
        assert data.card(data.names[0])["labels"] == {}
    data = load([{"path": "rows.jsonl", "columns": {**columns, "label": "q"}}])
    assert sum(data.card(data.names[0])["labels"].values()) == 20


def test_cards_bound_the_number_of_labels(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": f"row {i}", "label": str(i % 200)} for i in range(400)])
    labels = load([{"path": "rows.jsonl", "columns": TEXT}]).card("silo-0000")["labels"]
    assert (len(labels), sum(labels.values()), labels["(others)"]) == (50, 400, 302)


def test_cache_is_used_and_follows_changes(
    load: Load, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": "rows.jsonl", "columns": TEXT}
    jsonl([{"text": "one", "label": "x"}])
    whole = {"validation": 0, "test": 0}
    load([source], split=whole)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "read_rows", lambda _: pytest.fail("read again"))
        assert load([source], split=whole, seed=7).pooled().train["text"][:] == ["one"]
    jsonl([{"text": "two", "label": "x"}])
    assert load([source], split=whole).pooled().train["text"][:] == ["two"]
    changed = {"path": "rows.jsonl", "columns": {**TEXT, "text": "{text}!"}}
    assert load([changed], split=whole).pooled().train["text"][:] == ["two!"]


def test_a_warm_cache_may_be_read_only(load: Load, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl([{"text": "one", "label": "x"}])
    source = {"path": "rows.jsonl", "columns": TEXT}

    def read_only(_: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "locked", read_only)
        with pytest.raises(DataError, match="Read-only"):
            load([source])
    load([source])
    monkeypatch.setattr(cache, "locked", read_only)
    assert load([source], split={"validation": 0, "test": 0}).pooled().train["text"][:] == ["one"]


def test_cache_that_cannot_be_written(
    load: Load, jsonl: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jsonl([{"text": "one", "label": "x"}])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="FEDLM_CACHE"):
        load([{"path": "rows.jsonl", "columns": TEXT}])


def test_rows_stay_on_disk_and_travel_to_processes(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": f"row {i} " + "x" * 10_000, "label": "x"} for i in range(500)])
    data = load([{"path": "rows.jsonl", "columns": TEXT}])
    packed = pickle.dumps(data)
    assert len(packed) < 500_000  # of 5 MB
    assert pickle.loads(packed).silo("silo-0000").train[0] == data.silo("silo-0000").train[0]
    assert data.silo("silo-0000").train.cache_files


def test_ten_thousand_silos_are_cheap(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": f"row {i}", "label": str(i % 10)} for i in range(100_000)])
    start = time.process_time()
    partition = {"kind": "dirichlet", "silos": 10_000, "alpha": 0.5}
    data = load([{"path": "rows.jsonl", "columns": TEXT}], partition=partition)
    seconds = time.process_time() - start
    assert len(data.names) == 10_000
    assert seconds < 10
    assert len(data.silo("silo-9999").train) >= 2
