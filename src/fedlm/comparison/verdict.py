"""From what each arm scored, item by item, to intervals, a table and one honest sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlm.comparison.arms import ALONE, ALONE_COMPUTE, BASE, CENTRALISED, FEDERATED
from fedlm.errors import RunError
from fedlm.evaluation import summarise
from fedlm.evaluation.intervals import bootstrap_mean, student_t
from fedlm.evaluation.summary import perplexity
from fedlm.messages import Fields
from fedlm.recipe.tasks import FIGURES, WRITTEN

HEADLINES = ("accuracy", "generation_accuracy", "reward_accuracy", "reward", "f1", "rougeL", "exact_match", "loss")
"""The verdict is on the first of these that was measured."""

ITEMS = {
    "accuracy": "choice",
    "generation_accuracy": "generation",
    **{figure: figure for figures in WRITTEN.values() for figure in figures},
    "reward_accuracy": "reward",
    "reward": "earned",
    "alignment": "alignment",
    "loss": "nll",
}

ENOUGH_ITEMS = 20
"""With fewer test items nothing is decided: intervals over so few are too narrow (the bootstrap's are false in 8 to 10
of 100 cases at five to eight items, and have no width at all where all items agree)."""

COSTS = ("bytes_up", "bytes_down", "seconds", "wall_seconds", "peak_pss", "tokens", "tokens_per_second", "steps")

IN_WORDS = {
    BASE: "the base model",
    ALONE: "each silo alone with equal steps",
    ALONE_COMPUTE: "each silo alone with equal total compute",
    CENTRALISED: "all data in one place",
}


@dataclass(frozen=True)
class ArmResult:
    """One arm with one seed: its counts by silo of the global test set, with items, and what it cost."""

    arm: str
    seed: int
    measured: Mapping[str, Mapping[str, Any]]
    cost: Fields = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.arm.split(":", 1)[0]

    def items(self, name: str) -> np.ndarray:
        """Results of every test item in the order of the silos: a value of `ITEMS`, or `tokens`."""
        found = [self.measured[silo].get("items", {}).get(name, []) for silo in sorted(self.measured)]
        return np.concatenate([np.asarray(part, dtype=np.float64) for part in found]) if found else np.zeros(0)


def arm_metrics(result: ArmResult) -> Fields:
    """The summary of an arm on the global test set, with 95 % intervals (Wilson; bootstrap for the loss)."""
    summary = summarise(result.measured)
    nll, tokens = result.items("nll"), result.items("tokens")
    if len(nll) and tokens.sum() > 0:
        low, high = bootstrap_mean(nll, tokens, seed=result.seed, purpose="loss")
        summary["loss_interval"] = [low, high]
        if "perplexity" in summary and None not in (bounds := (perplexity(low), perplexity(high))):
            summary["perplexity_interval"] = list(bounds)
    for figure in (f for f, facts in FIGURES.items() if facts.unit and f in summary):
        if len(scores := result.items(figure)):
            summary[f"{figure}_interval"] = list(bootstrap_mean(scores, seed=result.seed, purpose=figure))
    return summary


def headline(results: Sequence[ArmResult]) -> str:
    """The metric that the verdict is on."""
    for metric in HEADLINES:
        if all(len(result.items(ITEMS[metric])) for result in results):
            return metric
    return "loss"


def judge(results: Sequence[ArmResult], *, silos_total: int) -> Fields:
    """Compare the federated arm with every other kind of arm, item by item on the same test rows.

    For kinds of several arms (each silo alone) the other side is the mean over these arms. The interval is the
    bootstrap over items of the paired differences with one seed, Student's t over the seeds' differences with several.

    Returns:
        {"metric", "higher_is_better", "items", "seeds", "comparisons": [{"against", "arms", "federated", "other",
        "difference", "interval", "interval_over", "outcome": "better"|"worse"|"undecided", "by_seed"}], "selection",
        "sentence"}; the difference is federated minus other. Below `ENOUGH_ITEMS` the outcome is "undecided".

    Raises:
        RunError: the loss is compared and no test row has a target token.
    """
    metric = headline(results)
    higher = metric != "loss"
    seeds = sorted({result.seed for result in results})
    present = {result.kind for result in results}
    comparisons = [
        _compare(results, kind, metric, higher, seeds)
        for kind in (BASE, ALONE, ALONE_COMPUTE, CENTRALISED)
        if kind in present
    ]
    federated = [r for r in results if r.kind == FEDERATED]
    verdict: Fields = {
        "metric": metric,
        "higher_is_better": higher,
        "items": len(federated[0].items(ITEMS[metric])),
        "seeds": seeds,
        "silos_total": silos_total,
        "comparisons": comparisons,
        "selection": "every arm is measured after its last round; nothing was selected on held-out text",
    }
    return {**verdict, "sentence": sentence(verdict)}


def _compare(results: Sequence[ArmResult], kind: str, metric: str, higher: bool, seeds: Sequence[int]) -> Fields:
    by_seed: list[Fields] = []
    arms = items = 0
    for seed in seeds:
        federated = next(r for r in results if r.seed == seed and r.kind == FEDERATED)
        others = [r for r in results if r.seed == seed and r.kind == kind]
        arms = max(arms, len(others))
        ours = federated.items(ITEMS[metric])
        theirs = np.mean([r.items(ITEMS[metric]) for r in others], axis=0)
        weights = federated.items("tokens") if metric == "loss" else np.ones_like(ours)
        if not weights.sum():
            raise RunError(
                "no test row keeps a target token, so there is nothing to compare on",
                fix="raise training.max_length or shorten the prompts",
            )
        items = len(ours)
        by_seed.append(
            {
                "seed": seed,
                "federated": float(ours.sum() / weights.sum()),
                "other": float(theirs.sum() / weights.sum()),
                "difference": float((ours - theirs).sum() / weights.sum()),
                "interval": list(bootstrap_mean(ours - theirs, weights, seed=seed, purpose=f"against {kind}")),
            }
        )
    differences = [entry["difference"] for entry in by_seed]
    interval = list(student_t(differences)) if len(seeds) > 1 else by_seed[0]["interval"]
    outcome = "undecided"
    if items >= ENOUGH_ITEMS and (interval[0] > 0 or interval[1] < 0):
        outcome = "better" if (interval[0] > 0) == higher else "worse"
    return {
        "against": kind,
        "arms": arms,
        "federated": _mean(entry["federated"] for entry in by_seed),
        "other": _mean(entry["other"] for entry in by_seed),
        "difference": _mean(differences),
        "interval": interval,
        "interval_over": "seeds" if len(seeds) > 1 else "items",
        "outcome": outcome,
        "by_seed": by_seed,
    }


def sentence(verdict: Fields) -> str:
    """Whether federating helped against silos alone, with the interval and what it covers."""
    metric = verdict["metric"]
    compared = {c["against"]: c for c in verdict["comparisons"]}
    first = next((compared[k] for k in (ALONE, ALONE_COMPUTE, BASE, CENTRALISED) if k in compared), None)
    if first is None:
        return "There is nothing to compare the federated model with."
    opening = {
        "better": "Federating helped",
        "worse": "Federating did worse",
        "undecided": "Whether federating helped cannot be told from this test set",
    }[first["outcome"]]
    compute = compared.get(ALONE_COMPUTE)
    if first["against"] == ALONE and compute is not None and compute["outcome"] != first["outcome"]:
        opening += {
            "better": " at equal steps (and it helped at equal total compute)",
            "worse": " at equal steps per silo, but not at equal total compute",
            "undecided": " at equal steps per silo (at equal total compute it cannot be told)",
        }[compute["outcome"]]
    words = {"accuracy": "accuracy", "generation_accuracy": "accuracy of generated answers"}
    name = words.get(metric) or FIGURES[metric].words
    text = (
        f"{opening}: {name} on {verdict['items']:,} held-out items of all silos is "
        f"{_value(first['federated'], metric)} federated and {_value(first['other'], metric)} for "
        f"{_who(first, verdict['silos_total'])}, {_gap(first, metric)}"
    )
    for kind in (ALONE_COMPUTE, CENTRALISED):
        other = compared.get(kind)
        if other is not None and other is not first:
            whom = _who(other, verdict["silos_total"])
            text += f"; against {_value(other['other'], metric)} for {whom}, {_gap(other, metric)}"
    seeds = verdict["seeds"]
    few = f"; fewer than {ENOUGH_ITEMS} items decide nothing" if verdict["items"] < ENOUGH_ITEMS else ""
    covered = "one seed, so chance in training is not covered" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{text} (95 % intervals over {first['interval_over']}; {covered}{few})."


def _who(comparison: Fields, silos_total: int) -> str:
    words = IN_WORDS[comparison["against"]]
    if comparison["against"] not in (ALONE, ALONE_COMPUTE):
        return words
    count = comparison["arms"]
    return f"{words} (mean of {count}{f' of {silos_total}' if count < silos_total else ''})"


def _value(value: float, metric: str) -> str:
    return f"{value:.4f}" if metric == "loss" else f"{100 * value:.1f} %"


def _gap(comparison: Fields, metric: str) -> str:
    low, high = comparison["interval"]
    if metric == "loss":
        return f"{comparison['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"{100 * comparison['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(results: Sequence[ArmResult]) -> list[Fields]:
    """One row per kind of arm and, where a kind is of several arms, one for each of them, averaged over seeds.

    Intervals: over items with one seed (for a mean over silos, bootstrap of the items' mean), over seeds with several.
    Costs are those of one arm, averaged.
    """
    rows = []
    for kind in (BASE, ALONE, ALONE_COMPUTE, FEDERATED, CENTRALISED):
        of_kind = [r for r in results if r.kind == kind]
        names = sorted({r.arm for r in of_kind})
        if not names:
            continue
        if len(names) > 1:
            rows.append({**_row(of_kind), "arm": f"{kind} (mean of {len(names)})", "kind": kind, "of": None})
        for name in names:
            one = {**_row([r for r in of_kind if r.arm == name]), "arm": name, "kind": kind}
            rows.append({**one, "of": kind if len(names) > 1 else None})
    return rows


def _row(results: Sequence[ArmResult]) -> Fields:
    """The mean of some results (several silos, several seeds) with intervals."""
    seeds = sorted({r.seed for r in results})
    summaries = [summarise(r.measured) for r in results]
    row: Fields = {"arms": len(results), "seeds": len(seeds)}
    for metric, item in ITEMS.items():
        if not all(metric in s for s in summaries):
            continue
        row[metric] = _mean(s[metric] for s in summaries)
        per_seed = [
            _mean(s[metric] for r, s in zip(results, summaries, strict=True) if r.seed == seed) for seed in seeds
        ]
        if len(seeds) > 1:
            row[f"{metric}_interval"] = list(student_t(per_seed))
        elif len(results) == 1:
            row[f"{metric}_interval"] = arm_metrics(results[0]).get(f"{metric}_interval")
        else:
            mean = np.mean([r.items(item) for r in results], axis=0)
            weights = results[0].items("tokens") if metric == "loss" else None
            row[f"{metric}_interval"] = list(bootstrap_mean(mean, weights, seed=seeds[0], purpose=f"row {metric}"))
        worst = [s["fairness"][metric]["worst"] for s in summaries]
        row[f"worst_{metric}"] = _mean(worst)
    if "loss" in row and all("perplexity" in s for s in summaries):
        row["perplexity"] = perplexity(row["loss"])
    for cost in COSTS:
        values = [r.cost[cost] for r in results if r.cost.get(cost) is not None]
        row[cost] = _mean(values) if values else None
    return row


def _mean(values: Any) -> float:
    listed = list(values)
    return float(sum(listed) / len(listed))
