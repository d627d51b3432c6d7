"""What can be combined: every algorithm, task, guard and kind of privacy, each judged by loading a recipe that has it.

No verdict is written down here. For each combination the smallest recipe that has it is built, and loaded with the
checks that a run's recipe goes through; it is allowed if it loads, and refused for the reasons that loading gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

from fedlm.recipe.guards import GUARDS, MASK
from fedlm.recipe.load import InvalidRecipeError, complete
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.privacy import IN_TRAINING, PrivacySpec
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS
from fedlm.recipe.yamltree import Tree

SILOS = 4
"""Enough for a mask, and for each rule against bad silos where none is bad."""

ROWS = "rows.jsonl"
"""Of the recipes here: every row has a prompt, an answer, a worse one, a label, 'yes' or 'no', and a person."""

_COLUMNS: dict[str, dict[str, Any]] = {
    "messages": {"prompt": "prompt", "response": "answer"},
    "text": {"text": "answer"},
    "preference": {"prompt": "prompt", "chosen": "answer", "rejected": "worse"},
    "choice": {"question": "prompt", "choices": ["yes", "no"], "answer": "label"},
}

_SMALL = {"seeds": 8, "buffer": 2, "population": 4, "fragments": 2, "byzantine": 0, "root": "silo-0000"}
"""Options of algorithms with which they run in seconds, among few silos."""


UNITS: tuple[str, ...] = get_args(PrivacySpec.model_fields["unit"].annotation)


@dataclass(frozen=True)
class Protection:
    """What happens to updates on their way: at most one guard, and at most one kind of differential privacy."""

    guard: str | None = None
    unit: str | None = None

    @property
    def name(self) -> str:
        parts = [self.guard, None if self.unit is None else f"privacy {self.unit}"]
        return " + ".join(part for part in parts if part is not None) or "nothing"


PROTECTIONS = (
    Protection(),
    *(Protection(guard) for guard in GUARDS),
    *(Protection(guard, unit) for guard, unit in product((None, MASK), UNITS)),
)


@dataclass(frozen=True)
class Rule:
    """An algorithm, with an option that decides what it goes with where it has one."""

    algorithm: str
    option: tuple[str, Any] | None = None

    @property
    def name(self) -> str:
        if self.option is None:
            return self.algorithm
        field, value = self.option
        return f"{self.algorithm}, {field}" + (f": {value}" if isinstance(value, str) else "")


def rules(algorithm: str) -> Iterator[Rule]:
    """The algorithm as it is, and, if it is a rule against bad silos, on groups and on products of factors."""
    yield Rule(algorithm)
    options = ALGORITHMS[algorithm].options
    if "groups" in options:
        yield Rule(algorithm, ("groups", 3))
    if "robust_on" in options:
        yield Rule(algorithm, ("robust_on", "product"))


@dataclass(frozen=True)
class Case:
    """One combination, with the settings that were tried."""

    rule: Rule
    task: str
    protection: Protection = Protection()
    adapter: str = "lora"
    error_feedback: bool = False

    def recipe(self) -> dict[str, Any]:
        """The smallest recipe of it: a few steps of a few examples, in as few rounds as there may be."""
        method, unit = ALGORITHMS[self.rule.algorithm], self.protection.unit
        algorithm: dict[str, Any] = {"name": self.rule.algorithm}
        algorithm |= {field: value for field, value in _SMALL.items() if field in method.options}
        algorithm |= dict([self.rule.option] if self.rule.option else [])
        if algorithm.get("robust_on") == "product" and "noise" in method.options:
            algorithm["noise"] = 0.0
        training: dict[str, Any] = {"steps": max(2, method.min_steps), "batch_size": 4, "max_length": 64}
        federation: dict[str, Any] = {"rounds": max(2, method.min_rounds), "workers": 1, "algorithm": algorithm}
        if unit in ("user", "silo") and not method.equal_weights:
            algorithm["weights"] = "equal"
        if unit in IN_TRAINING and "clip_norm" not in method.without:
            training["clip_norm"] = None
        if method.goes_on:
            training["keep_optimizer"] = True
            federation["downlink"] = {"send": "changed"}
        found: dict[str, Any] = {
            "name": "smallest",
            "task": self.task,
            "model": {"source": "smollm2-135m-instruct", "dtype": "float32"},
            "adapter": {"kind": self.adapter},
            "data": {
                "sources": [{"path": ROWS, "columns": _COLUMNS[TASKS[self.task].kinds[0]]}],
                "partition": {"kind": "iid", "silos": SILOS},
                "split": {"validation": 0.2, "test": 0.0},
            },
            "training": training,
            "federation": federation,
        }
        if self.protection.guard is not None:
            guard: dict[str, Any] = {"name": self.protection.guard}
            found["guards"] = [guard | ({"error_feedback": True} if self.error_feedback else {})]
        if unit is not None:
            found["privacy"] = {"unit": unit, "epsilon": 20.0, "delta": 0.01}
            found["privacy"] |= {"user": "person"} if unit == "user" else {}
        return _of_task(found, self.task, self.adapter)

    def load(self) -> Recipe:
        """Raises:
        RecipeError: the combination is refused, with the reasons.
        """
        return complete(Tree(self.recipe()), Path())


def _of_task(recipe: dict[str, Any], task: str, adapter: str) -> dict[str, Any]:
    """What a task needs to be small, or cannot do without."""
    if task == "preference" and adapter == "full":
        recipe["preference"] = {"loss": "orpo"}  # it compares with no reference, which full training overwrites
    if task == "reinforce":
        recipe["reinforce"] = {"completions": 2, "max_new_tokens": 4}
    if task == "group-preference":
        recipe["group_preference"] = {"context": 2}
        recipe["adapter"] |= {"width": 16, "heads": 2, "layers": 1} if adapter == "predictor" else {}
    return recipe


@dataclass(frozen=True)
class Verdict:
    """Whether a combination can be had."""

    case: Case
    """As it is allowed, or as it was refused for the fewest reasons."""
    reasons: tuple[str, ...] = ()
    """'field: reason' each; empty where it is allowed."""

    @property
    def allowed(self) -> bool:
        return not self.reasons


def judge(case: Case) -> Verdict:
    """The verdict on this case as it stands."""
    try:
        case.load()
    except InvalidRecipeError as error:
        return Verdict(case, tuple(problem.split(": ", 1)[1] for problem in error.problems))  # less the place
    return Verdict(case)


def judge_any(cases: Iterable[Case]) -> Verdict:
    """The first of these cases that is allowed, error feedback being given where a guard needs it; else the one with
    the fewest reasons against it."""
    best: Verdict | None = None
    for case in cases:
        found = judge(case)
        if any(reason.startswith("guards.0.error_feedback") for reason in found.reasons):
            other = judge(replace(case, error_feedback=True))
            both = tuple(reason for reason in found.reasons if reason in other.reasons)
            found = other if other.allowed else replace(found, reasons=both or found.reasons)
        if found.allowed:
            return found
        if best is None or len(found.reasons) < len(best.reasons):
            best = found
    assert best is not None
    return best


def adapters(rule: Rule, task: str) -> tuple[str, ...]:
    """Kinds of adapter with which the task can be trained by this rule; empty where there is none."""
    return tuple(kind for kind in _tried(rule, task) if judge(Case(rule, task, adapter=kind)).allowed)


def _tried(rule: Rule, task: str) -> tuple[str, ...]:
    return ("predictor",) if TASKS[task].head == "predictor" else ALGORITHMS[rule.algorithm].adapters


def verdicts(rule: Rule, task: str) -> tuple[tuple[str, ...], list[Verdict]]:
    """The kinds of adapter that there can be, and for each of `PROTECTIONS` the verdict with the first kind for which
    it is best.

    What cannot be had without protection cannot be had with it, for the same reasons.
    """
    kinds = adapters(rule, task)
    if not kinds:
        refused = judge_any(Case(rule, task, adapter=kind) for kind in _tried(rule, task))
        return kinds, [Verdict(replace(refused.case, protection=p), refused.reasons) for p in PROTECTIONS]
    return kinds, [judge_any(Case(rule, task, p, kind) for kind in kinds) for p in PROTECTIONS]
