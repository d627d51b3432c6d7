"""A run directory read back as facts, however much of it exists.

An interrupted run has no evaluation, and most runs no comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.recipe.methods import ALGORITHMS
from fedlm.report.format import METRICS, is_number, is_share, plural

Json = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Group:
    """The arms of a comparison that are one kind of training, e.g. every silo alone, over all seeds."""

    key: str
    name: str
    arms: list[Json]
    row: Json
    """The comparison's own table row for the whole kind: means with their intervals."""

    def estimate(self, metric: str) -> Estimate | None:
        return estimate(self.row, metric)

    def members(self) -> str:
        """What the mean is taken over, e.g. `4 silos × 2 seeds`."""
        silos = len({arm.get("arm") for arm in self.arms})
        seeds = len({arm.get("seed") for arm in self.arms})
        over = [plural(n, what) for n, what in ((silos, "silo"), (seeds, "seed")) if n > 1]
        return " × ".join(over) or "1 arm"


GROUPS = {
    "base": "base model",
    "alone": "each silo alone",
    "alone-compute": "each silo alone, same total compute",
    "federated": "federated",
    "centralised": "all data in one place",
}
"""Kinds of arm in the order that they're shown, and their names in words."""


@dataclass
class RunFacts:
    """Everything that a run directory says; empty where it says nothing."""

    folder: Path
    run: Json = field(default_factory=dict)
    recipe_text: str = ""
    recipe: Json = field(default_factory=dict)
    rounds: list[Json] = field(default_factory=list)
    base_validation: Json = field(default_factory=dict)
    absent: list[Json] = field(default_factory=list)
    """Failures from before the first round: silos that did not take part."""
    evaluation: Json = field(default_factory=dict)
    data: Json = field(default_factory=dict)
    comparison: Json = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.run.get("name") or self.recipe.get("name") or self.folder.name)

    @property
    def rounds_planned(self) -> int | None:
        planned = (self.recipe.get("federation") or {}).get("rounds")
        return int(planned) if is_number(planned) else None

    @property
    def personal(self) -> bool:
        """Whether each silo has, and is measured with, a model of its own."""
        name = ((self.recipe.get("federation") or {}).get("algorithm") or {}).get("name")
        return name in ALGORITHMS and ALGORITHMS[name].personal

    def silos(self) -> list[str]:
        """Names of all silos that the data card or any round mentions, sorted."""
        names = set(self.data.get("silos") or {})
        for line in self.rounds:
            names.update(line.get("silos") or {}, line.get("sampled") or [])
        return sorted(names)

    def failures(self) -> list[Json]:
        """Every failure as {"round", "silo", "kind", "reason"}, those of measuring included; round -1 is the start."""
        found = [{"round": -1, **f} for f in [*self.absent, *(self.base_validation.get("failures") or [])]]
        for line in self.rounds:
            measuring = (line.get("validation") or {}).get("failures") or []
            found += [{"round": line.get("round"), **f} for f in [*(line.get("failures") or []), *measuring]]
        return found

    def total(self, key: str) -> float | None:
        """Sum over the rounds of a number such as `bytes_up` or `seconds`; None where no round has it."""
        values = [line[key] for line in self.rounds if is_number(line.get(key))]
        return sum(values) if values else None

    def peak(self, key: str) -> float | None:
        """Largest value over the rounds."""
        return max((line[key] for line in self.rounds if is_number(line.get(key))), default=None)

    def groups(self) -> list[Group]:
        """The comparison's kinds of arm, in the order to show them."""
        found = []
        rows = [row for row in self.comparison.get("table") or [] if row.get("of") is None]
        for row in sorted(rows, key=lambda row: [*GROUPS, row["kind"]].index(row["kind"])):
            kind = str(row["kind"])
            arms = [a for a in self.comparison.get("arms") or [] if str(a.get("arm", "")).split(":")[0] == kind]
            found.append(Group(kind, GROUPS.get(kind, kind), arms, row))
        return found

    def before_after(self) -> tuple[Json, Json, str]:
        """Held-out results of the base and the best model, and on which rows: the test set, else validation."""
        base, final = self.evaluation.get("base") or {}, self.evaluation.get("final") or {}
        if final:
            return base, final, "test"
        validated = {line["round"]: line["validation"] for line in self.rounds if line.get("validation")}
        last = validated[max(validated)] if validated else {}
        return self.base_validation, validated.get(self.run.get("best_round"), last), "validation"


def metric_keys(many: Iterable[Json]) -> list[str]:
    """Keys of the metrics that all of these summaries hold, the most telling first."""
    summaries = [m for m in many if m]
    if not summaries:
        return []
    return [k for k in METRICS if all(estimate(m, k) is not None for m in summaries)]


def estimate(metrics: Json, key: str) -> Estimate | None:
    """A metric's value and its interval (`<key>_interval`) from a summary; None where it isn't there."""
    value, interval = metrics.get(key), metrics.get(f"{key}_interval")
    if not is_number(value):
        return None
    if isinstance(interval, list | tuple) and len(interval) == 2 and all(is_number(v) for v in interval):
        return Estimate(float(value), float(interval[0]), float(interval[1]))
    return Estimate(float(value))


def fairness(summary: Json, key: str) -> dict[str, float]:
    """A metric by silo, from a summary's `silos`."""
    found = {name: estimate(values, key) for name, values in (summary.get("silos") or {}).items() if values}
    return {name: e.value for name, e in sorted(found.items()) if e is not None}


def spread(values: Iterable[float], key: str) -> dict[str, float]:
    """Mean, worst and standard deviation over silos."""
    from statistics import fmean, pstdev

    numbers = list(values)
    worst = min(numbers) if is_share(key) else max(numbers)
    return {"mean": fmean(numbers), "worst": worst, "deviation": pstdev(numbers)}


def read_run(folder: Path, *, untrained: bool = False) -> RunFacts:
    """Read whatever a run directory holds.

    Args:
        untrained: also of a run that trains nothing.

    Raises:
        RunError: there is no run here, or one of its files is damaged.
    """
    if not folder.is_dir():
        raise RunError(f"there is no run directory '{folder}'", fix="name a folder that `fedlm run` wrote")
    if not any((folder / name).exists() for name in ("run.json", "rounds.jsonl", "comparison.json")):
        raise RunError(
            f"'{folder}' is not a run directory: it holds neither run.json nor rounds.jsonl nor comparison.json",
            fix="name a folder that `fedlm run` or `fedlm compare` wrote",
        )
    facts = RunFacts(folder)
    facts.run = _optional(folder / "run.json", json.loads)
    facts.evaluation = _optional(folder / "evaluation.json", json.loads)
    facts.data = _optional(folder / "data.json", json.loads)
    facts.comparison = _optional(folder / "comparison.json", json.loads)
    recipe = folder / "recipe.yaml"
    if recipe.exists():
        facts.recipe_text = recipe.read_text(encoding="utf-8")
        facts.recipe = _optional(recipe, _parse_yaml)
    if not untrained and facts.recipe and any(facts.recipe.get(part) for part in ("search", "in_context")):
        raise RunError(
            "a run of `fedlm prompt` trains nothing, so it has no report",
            where=str(folder),
            fix="read evaluation.json and rounds.jsonl there",
        )
    for line in _read_lines(folder / "rounds.jsonl"):
        if int(line.get("round", 0)) < 0:
            facts.base_validation = line.get("validation") or {}
            facts.absent = line.get("failures") or []
        else:
            facts.rounds.append(line)
    facts.rounds.sort(key=lambda line: int(line.get("round", 0)))
    return facts


def _optional(path: Path, parse: Callable[[str], Any]) -> Json:
    if not path.exists():
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise RunError(f"{path.name} is damaged ({type(error).__name__})", where=str(path)) from error
    return value if isinstance(value, dict) else {}


def _parse_yaml(text: str) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def _read_lines(path: Path) -> list[Json]:
    """Objects of a JSON Lines file; a last line cut off by a crash is left out, any other damage is an error."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found: dict[int, Json] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise RunError(f"{path.name} is damaged", where=f"{path}:{number}") from error
        found[int(value.get("round", 0))] = value  # a resumed run may write a round again: the last one counts
    return list(found.values())
