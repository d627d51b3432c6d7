from __future__ import annotations

import json
import math

import pytest

from fedlm.evaluation import summarise

FIELDS = (
    "examples",
    "loss_sum",
    "loss_tokens",
    "choice_correct",
    "choice_correct_norm",
    "choice_total",
    "generation_correct",
    "generation_parsed",
    "generation_total",
)
A = dict(zip(FIELDS, (10, 30.0, 10, 9, 8, 10, 5, 8, 10), strict=True))
B = dict(zip(FIELDS, (2, 10.0, 10, 1, 2, 2, 1, 2, 2), strict=True))
EMPTY = dict.fromkeys(A, 0)


def test_global_figures_weigh_by_items_and_fairness_by_silos() -> None:
    result = summarise({"b": B, "a": A})
    assert result["examples"] == 12
    assert result["loss"] == pytest.approx(2.0)
    assert result["perplexity"] == pytest.approx(math.exp(2.0))
    assert result["accuracy"] == pytest.approx(10 / 12)
    assert result["accuracy_norm"] == pytest.approx(10 / 12)
    assert result["generation_accuracy"] == pytest.approx(0.5)
    assert result["parse_rate"] == pytest.approx(10 / 12)
    assert result["accuracy_interval"][0] < 10 / 12 < result["accuracy_interval"][1]
    assert result["fairness"]["accuracy"] == {
        "mean": pytest.approx(0.7),
        "worst": 0.5,
        "worst_silo": "b",
        "variance": pytest.approx(0.04),
    }
    assert result["fairness"]["loss"]["worst_silo"] == "a"
    assert list(result["silos"]) == ["a", "b"]
    json.dumps(result, allow_nan=False)


def test_silos_without_rows_count_nowhere() -> None:
    assert summarise({"a": A, "empty": EMPTY})["fairness"]["accuracy"]["mean"] == 0.9


def test_figures_that_were_not_measured_are_left_out() -> None:
    result = summarise({"a": {**EMPTY, "examples": 1, "loss_sum": 1000.0, "loss_tokens": 1}})
    assert "accuracy" not in result
    assert "parse_rate" not in result
    assert result["perplexity"] is None
    assert set(result["fairness"]) == {"loss"}
    assert summarise({"empty": EMPTY})["fairness"] == {}
