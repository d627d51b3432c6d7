"""Mechanisms are data: checked when made, equal after JSON, refused when anything is missing or more."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedlm.errors import PrivacyError
from fedlm.privacy.mechanisms import (
    DistributedNoise,
    Everyone,
    FixedSize,
    Gaussian,
    Mechanism,
    Poisson,
    from_json,
    to_json,
)

EXAMPLES: list[Mechanism] = [
    Gaussian("silo", "zero-out", None),
    Gaussian("example", "add-or-remove", 1.1, Poisson(0.01, secret=True), 1000),
    Gaussian("silo", "replace", 3.5, FixedSize(5, 50, secret=False), 7),
    DistributedNoise("silo", "replace", "skellam", 1.0, bound=812.5, dimension=1000, survivors=7, count=3),
    DistributedNoise("user", "zero-out", "discrete-gaussian", None, bound=3, dimension=1, survivors=1, retry=None),
]


@pytest.mark.parametrize("mechanism", EXAMPLES)
def test_json_there_and_back(mechanism: Mechanism) -> None:
    assert from_json(json.loads(json.dumps(to_json(mechanism)))) == mechanism


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "laplace"},
        {"noise_multiplier": "1"},
        {"count": 1.5},
        {"count": True},
        {"unit": "row"},
        {"more": 1},
        {"sampling": {"kind": "poisson", "rate": 0.5}},
        {"sampling": {"kind": "shuffled"}},
        {"sampling": None},
    ],
)
def test_other_json_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError):
        from_json({**to_json(EXAMPLES[1]), **change})


def test_lists_and_missing_fields_are_refused() -> None:
    fields = to_json(EXAMPLES[3])
    del fields["bound"]
    for value in (fields, [], None, "gaussian"):
        with pytest.raises(PrivacyError):
            from_json(value)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Gaussian("silo", "zero-out", 0.0), "noise multiplier"),
        (lambda: Gaussian("silo", "zero-out", float("nan")), "noise multiplier"),
        (lambda: Gaussian("silo", "zero-out", 1.0, Everyone(), 0), "count"),
        (lambda: Gaussian("bank", "zero-out", 1.0), "unit"),  # type: ignore[arg-type]
        (lambda: Gaussian("silo", "change", 1.0), "adjacency"),  # type: ignore[arg-type]
        (lambda: Poisson(0.0, secret=True), "rate"),
        (lambda: Poisson(1.5, secret=True), "rate"),
        (lambda: Poisson(float("nan"), secret=True), "rate"),
        (lambda: FixedSize(6, 5, secret=True), "sample"),
        (lambda: FixedSize(0, 5, secret=True), "sample"),
        (lambda: DistributedNoise("silo", "add-or-remove", "skellam", 1.0, 10, 10, 3), "takes its noise along"),
        (lambda: DistributedNoise("silo", "zero-out", "laplace", 1.0, 10, 10, 3), "laplace"),  # type: ignore[arg-type]
        (lambda: DistributedNoise("silo", "zero-out", "skellam", 1.0, 10, 10, 0), "survivors"),
        (lambda: DistributedNoise("silo", "zero-out", "skellam", 1.0, 10, 10, 3, retry=1.0), "retry"),
        (lambda: DistributedNoise("silo", "zero-out", "skellam", 1.0, float("inf"), 10, 3), "bound"),
    ],
)
def test_impossible_mechanisms(make: Any, word: str) -> None:
    with pytest.raises(PrivacyError, match=word):
        make()
