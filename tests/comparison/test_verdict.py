"""Intervals, the table and the sentence, from made-up scores whose truth is known."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fedlm.comparison.verdict import ArmResult, arm_metrics, judge, table
from fedlm.errors import RunError
from fedlm.evaluation.intervals import student_t


def arm(name: str, hits: Any, seed: int = 0, nll: Any = None) -> ArmResult:
    """An arm whose items are dealt to two silos."""
    measured = {}
    for silo, part in (("silo-0000", slice(0, None, 2)), ("silo-0001", slice(1, None, 2))):
        choice = [int(h) for h in hits[part]]
        losses = [float(v) for v in (nll if nll is not None else np.ones(len(hits)))[part]]
        measured[silo] = {
            "examples": len(choice),
            "loss_sum": sum(losses),
            "loss_tokens": 2 * len(losses),
            "choice_correct": sum(choice),
            "choice_correct_norm": sum(choice),
            "choice_total": len(choice),
            "items": {"choice": choice, "nll": losses, "tokens": [2] * len(losses)},
        }
    return ArmResult(name, seed, measured, {"steps": 10, "bytes_up": 5, "seconds": 2.0, "tokens_per_second": None})


def hits(share: float, seed: int, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).random(count) < share


def test_a_clear_gain_is_called_one() -> None:
    results = [
        arm("base", hits(0.5, 1)),
        arm("federated", hits(0.85, 2)),
        arm("alone:silo-0000", hits(0.6, 3)),
        arm("alone:silo-0001", hits(0.6, 4)),
        arm("centralised", hits(0.85, 5)),
    ]
    verdict = judge(results, silos_total=2)
    against = {c["against"]: c for c in verdict["comparisons"]}
    assert verdict["metric"] == "accuracy"
    assert against["alone"]["outcome"] == against["base"]["outcome"] == "better"
    assert against["centralised"]["outcome"] == "undecided"
    mean = (hits(0.6, 3).mean() + hits(0.6, 4).mean()) / 2
    assert against["alone"]["difference"] == pytest.approx(hits(0.85, 2).mean() - mean)
    assert against["alone"]["arms"] == 2
    assert verdict["sentence"].startswith("Federating helped: accuracy on 400 held-out items")
    assert "one seed" in verdict["sentence"]
    json.dumps(verdict, allow_nan=False)


def test_noise_is_not_called_a_gain_and_a_loss_is_called_one() -> None:
    same = [arm("federated", hits(0.6, 1)), arm("alone:a", hits(0.6, 2))]
    assert "cannot be told" in judge(same, silos_total=1)["sentence"]
    worse = [arm("federated", hits(0.4, 1)), arm("alone:a", hits(0.8, 2))]
    assert judge(worse, silos_total=1)["sentence"].startswith("Federating did worse")


def test_equal_compute_that_disagrees_is_in_the_opening() -> None:
    results = [arm("federated", hits(0.7, 1)), arm("alone:a", hits(0.5, 2)), arm("alone-compute:a", hits(0.9, 3))]
    assert judge(results, silos_total=1)["sentence"].startswith(
        "Federating helped at equal steps per silo, but not at equal total compute"
    )


def test_items_are_compared_in_pairs() -> None:
    """Two arms that differ on few of many hard and easy items: paired, the difference is certain."""
    base = hits(0.5, 1)
    better = base.copy()
    better[np.flatnonzero(~base)[:12]] = True
    verdict = judge([arm("federated", better), arm("alone:a", base)], silos_total=1)
    low, high = verdict["comparisons"][0]["interval"]
    assert 0 < low < 12 / 400 < high < 0.06


def test_where_only_a_loss_was_measured_lower_is_better() -> None:
    def without_choice(result: ArmResult) -> ArmResult:
        measured = {
            silo: {k: v for k, v in counts.items() if not k.startswith("choice")} | {"items": dict(counts["items"])}
            for silo, counts in result.measured.items()
        }
        for counts in measured.values():
            del counts["items"]["choice"]
        return ArmResult(result.arm, result.seed, measured, result.cost)

    generator = np.random.default_rng(0)
    results = [
        without_choice(arm("federated", hits(0.5, 1), nll=generator.normal(1.0, 0.1, 400))),
        without_choice(arm("alone:a", hits(0.5, 1), nll=generator.normal(2.0, 0.1, 400))),
    ]
    verdict = judge(results, silos_total=1)
    assert verdict["metric"] == "loss"
    assert verdict["comparisons"][0]["difference"] == pytest.approx(-0.5, abs=0.02)
    assert verdict["comparisons"][0]["outcome"] == "better"


def test_several_seeds_give_an_interval_over_seeds() -> None:
    results = []
    for seed in (0, 1, 2):
        results += [arm("federated", hits(0.8, seed), seed), arm("alone:a", hits(0.6, 10 + seed), seed)]
    verdict = judge(results, silos_total=1)
    comparison = verdict["comparisons"][0]
    assert comparison["interval_over"] == "seeds"
    assert len(comparison["by_seed"]) == 3
    assert comparison["interval"] == list(student_t([one["difference"] for one in comparison["by_seed"]]))
    assert "3 seeds" in verdict["sentence"]


def test_a_few_items_decide_nothing() -> None:
    for count, decided in ((2, False), (19, False), (20, True)):
        verdict = judge([arm("federated", np.ones(count)), arm("alone:a", np.zeros(count))], silos_total=1)
        assert verdict["comparisons"][0]["outcome"] == ("better" if decided else "undecided")
        assert ("fewer than 20 items decide nothing" in verdict["sentence"]) is not decided


def test_no_target_token_is_an_error_not_nan() -> None:
    results = [arm("federated", hits(0.5, 1)), arm("alone:a", hits(0.5, 1))]
    for result in results:
        for counts in result.measured.values():
            counts["items"] = {"nll": [0.0] * 200, "tokens": [0] * 200}
    with pytest.raises(RunError, match="no test row keeps a target token"):
        judge(results, silos_total=1)


def test_a_loss_interval_counts_tokens_not_rows() -> None:
    """One row in ten has a hundred tokens at a loss of 3, the others one token at a loss of 1."""
    long = np.arange(400) % 10 == 0
    one = arm("federated", hits(0.5, 1), nll=np.where(long, 300.0, 1.0))
    for counts in one.measured.values():
        nll = np.asarray(counts["items"]["nll"])
        counts["items"]["tokens"] = np.where(nll > 1, 100, 1).tolist()
        counts["loss_tokens"] = int(sum(counts["items"]["tokens"]))
    low, high = arm_metrics(one)["loss_interval"]
    assert 2.7 < low < (40 * 300 + 360) / (40 * 100 + 360) < high < 3.0


def test_metrics_carry_intervals() -> None:
    metrics = arm_metrics(arm("federated", hits(0.8, 0), nll=np.random.default_rng(0).gamma(2, 1, 400)))
    for name in ("accuracy", "loss", "perplexity"):
        low, high = metrics[f"{name}_interval"]
        assert low < metrics[name] < high


def test_the_table_has_a_row_for_each_kind_and_each_silo() -> None:
    results = [
        arm("base", hits(0.5, 1)),
        arm("federated", hits(0.85, 2)),
        arm("alone:a", hits(0.6, 3)),
        arm("alone:b", hits(0.7, 4)),
    ]
    rows = table(results)
    assert [row["arm"] for row in rows] == ["base", "alone (mean of 2)", "alone:a", "alone:b", "federated"]
    mean, one, other = rows[1], rows[2], rows[3]
    assert mean["accuracy"] == pytest.approx((one["accuracy"] + other["accuracy"]) / 2)
    assert mean["accuracy_interval"][0] < mean["accuracy"] < mean["accuracy_interval"][1]
    assert one["of"] == "alone" and mean["of"] is None
    assert one["worst_accuracy"] <= one["accuracy"]
    assert mean["steps"] == 10 and mean["tokens_per_second"] is None
    json.dumps(rows, allow_nan=False)


def test_written_answers_are_compared_by_f1() -> None:
    def written(name: str, mean: float, seed: int) -> ArmResult:
        result = arm(name, hits(0.5, seed))
        scores = np.clip(np.random.default_rng(seed).normal(mean, 0.2, 400), 0, 1)
        measured = {}
        for (silo, counts), part in zip(result.measured.items(), (scores[::2], scores[1::2]), strict=True):
            items = {"f1": part.tolist(), "nll": counts["items"]["nll"], "tokens": counts["items"]["tokens"]}
            figures = {"f1": [float(part.sum()), len(part)]}
            losses = {name: counts[name] for name in ("examples", "loss_sum", "loss_tokens")}
            measured[silo] = {**losses, "figures": figures, "items": items}
        return ArmResult(name, 0, measured, result.cost)

    results = [written("base", 0.3, 1), written("federated", 0.6, 2), written("alone:a", 0.5, 3)]
    verdict = judge(results, silos_total=1)
    assert (verdict["metric"], verdict["items"], verdict["higher_is_better"]) == ("f1", 400, True)
    assert verdict["sentence"].startswith("Federating helped: F1 of words on 400 held-out items of all silos is ")
    low, high = arm_metrics(results[1])["f1_interval"]
    assert low < results[1].items("f1").mean() < high
    assert high - low == pytest.approx(2 * 1.96 * results[1].items("f1").std() / 20, rel=0.15)
    rows = table(results)
    assert rows[-1]["f1"] == pytest.approx(results[1].items("f1").mean()) and rows[-1]["f1_interval"]
