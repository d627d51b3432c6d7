"""Partitions: every row dealt once, keyed, and distributed as their papers say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlm.data.partition import deal, slugs
from fedlm.errors import DataError
from fedlm.recipe.schema import PartitionSpec


class Rows(dict[str, Any]):
    def __len__(self) -> int:
        return len(self["label"])


def rows(labels: list[str], groups: list[str] | None = None, domains: list[str] | None = None) -> Rows:
    return Rows(label=labels, group=groups or labels, domain=domains or ["d"] * len(labels))


def spec(kind: str, **options: Any) -> PartitionSpec:
    return PartitionSpec.model_validate({"kind": kind, **options})


KINDS = ["iid", "dirichlet", "quantity", "shards", "domain", "natural"]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    silos=st.integers(1, 12),
    alpha=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    labels=st.lists(st.sampled_from("abcd"), min_size=60, max_size=150),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_every_row_is_dealt_exactly_once(
    kind: str, silos: int, alpha: float, labels: list[str], seed: int, data: st.DataObject
) -> None:
    roles = np.array(data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=len(labels), max_size=len(labels))))
    options: dict[str, Any] = {"min_rows": 1, "alpha": alpha}
    if kind == "natural":
        options["by"] = "x"
    elif kind != "domain":
        options["silos"] = silos
    table = rows(labels, domains=labels)
    try:
        dealt = deal(table, spec(kind, **options), seed, roles)
    except DataError as fault:
        assert "min_rows" in str(fault)
        return
    if kind == "natural":
        lost = {
            label for label in set(labels) if not any(r == 0 for r, x in zip(roles, labels, strict=True) if x == label)
        }
        expected = [i for i, x in enumerate(labels) if x not in lost]
    else:
        expected = list(range(len(labels)))
    assert sorted(np.concatenate(list(dealt.values())).tolist()) == expected
    assert all((roles[part] == 0).any() for part in dealt.values())
    assert list(dealt) == sorted(dealt)
    again = deal(table, spec(kind, **options), seed, roles)
    assert all(np.array_equal(dealt[name], again[name]) for name in dealt)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "shards"])
def test_seeds_differ(kind: str) -> None:
    table = rows(["a", "b"] * 100)
    first, second = (deal(table, spec(kind, silos=4), seed) for seed in (0, 1))
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def test_iid_is_even_per_role() -> None:
    roles = np.array([0] * 83 + [1] * 9 + [2] * 9)
    dealt = deal(rows(["a"] * 101), spec("iid", silos=10), 0, roles)
    for role, sizes in ((0, {8, 9}), (1, {0, 1}), (2, {0, 1})):
        assert {int((roles[part] == role).sum()) for part in dealt.values()} == sizes


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_dirichlet_has_the_right_second_moment(alpha: float) -> None:
    """For p ~ Dir(alpha, ..., alpha) over S silos, E[sum p^2] = (alpha + 1) / (S alpha + 1)."""
    silos, per_label, count = 5, 400, 300
    labels = np.repeat([f"{i:03d}" for i in range(count)], per_label)
    dealt = deal(rows(labels.tolist()), spec("dirichlet", silos=silos, alpha=alpha), 3)
    shares = np.zeros((count, silos))
    for silo, part in enumerate(dealt.values()):
        shares[:, silo] = np.bincount(part // per_label, minlength=count) / per_label
    assert np.allclose(shares.sum(1), 1)
    expected = (alpha + 1) / (silos * alpha + 1)
    squares = (shares**2).sum(1)
    assert abs(squares.mean() - expected) < 4 * squares.std() / np.sqrt(count) + 0.002
    assert np.allclose(shares.mean(0), 1 / silos, atol=4 * shares.std() / np.sqrt(count))


def test_dirichlet_gives_held_out_rows_the_same_skew() -> None:
    labels = ["a", "b"] * 1000
    roles = np.repeat([0, 2], 1000)
    for part in deal(rows(labels), spec("dirichlet", silos=4, alpha=0.3), 0, roles).values():
        trained, tested = ([labels[i] for i in part if roles[i] == r] for r in (0, 2))
        assert abs(trained.count("a") - tested.count("a")) <= 2
        assert abs(trained.count("b") - tested.count("b")) <= 2


@pytest.mark.parametrize("kind", ["dirichlet", "quantity"])
def test_extreme_skew_still_gives_every_silo_min_rows(kind: str) -> None:
    """OpenFedLLM returns an empty list of silos for a non-IID split; here none is ever empty."""
    dealt = deal(rows(["a", "b", "c"] * 40), spec(kind, silos=20, alpha=1e-3, min_rows=5), 0)
    assert len(dealt) == 20
    assert min(map(len, dealt.values())) >= 5
    assert sum(map(len, dealt.values())) == 120


def test_quantity_skews_sizes_not_labels() -> None:
    labels = ["a", "b"] * 5000
    dealt = deal(rows(labels), spec("quantity", silos=8, alpha=0.5), 0)
    sizes = sorted(map(len, dealt.values()))
    assert sizes[-1] > 4 * max(1, sizes[0])
    share = [labels[i] for i in max(dealt.values(), key=len)].count("a") / sizes[-1]
    assert abs(share - 0.5) < 0.05


def test_shards_hold_few_labels() -> None:
    labels = [str(i % 10) for i in range(1000)]
    dealt = deal(rows(labels), spec("shards", silos=10, shards_per_silo=2), 0)
    assert all(len({labels[i] for i in part}) <= 4 for part in dealt.values())
    assert {len(part) for part in dealt.values()} == {100}


def test_natural_leaves_small_groups_out_and_keeps_the_largest() -> None:
    groups = ["tiny"] + ["big"] * 9 + ["mid"] * 5 + ["small"] * 3
    table = rows(["x"] * len(groups), groups)
    dealt = deal(table, spec("natural", by="g", min_rows=2), 0)
    held = {name: [groups[i] for i in part] for name, part in dealt.items()}
    assert held == {"big": ["big"] * 9, "mid": ["mid"] * 5, "small": ["small"] * 3}
    assert list(deal(table, spec("natural", by="g", max_silos=2), 0)) == ["big", "mid"]
    with pytest.raises(DataError, match="none of the 4 groups by 'g' has min_rows: 10"):
        deal(table, spec("natural", by="g", min_rows=10), 0)
    with pytest.raises(DataError, match="max_silos"):
        deal(table, spec("natural", by="g", silos=3), 0)


def test_domains() -> None:
    table = rows(["x"] * 90, domains=["a"] * 60 + ["b"] * 30)
    assert {n: len(p) for n, p in deal(table, spec("domain"), 0).items()} == {"a": 60, "b": 30}
    with pytest.raises(DataError, match="`silos` does not apply to a domain partition"):
        deal(table, spec("domain", silos=5), 0)


def test_too_few_rows_says_how_many_silos_are_possible() -> None:
    for kind in ("iid", "dirichlet", "quantity", "shards"):
        with pytest.raises(DataError, match="at most 5 silos are possible"):
            deal(rows(["a", "b"] * 5), spec(kind, silos=6, min_rows=2), 0)
        with pytest.raises(DataError, match=r"too few for any silo\. Fix: use more rows or a smaller min_rows$"):
            deal(rows(["a"]), spec(kind, silos=6, min_rows=2), 0)


def test_labels_are_needed() -> None:
    for kind in ("dirichlet", "shards"):
        with pytest.raises(DataError, match=r"columns\.label"):
            deal(rows([""] * 10), spec(kind, silos=2), 0)


def test_slugs_are_names_and_distinct() -> None:
    values = ["Gynaecology & Obstetrics", "a/b", "a b", "A-B", "ENT", "../..", "é" * 3, "x" * 100, "x" * 101]
    names = slugs(values)
    assert names[0] == "Gynaecology-Obstetrics"
    assert names[4] == "ENT"
    assert len({n.casefold() for n in names}) == len(values)
    import re

    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", n) for n in names)
