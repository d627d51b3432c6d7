"""docs/composition.md: the verdicts of `fedlm.recipe.composition` as one table, alike rows and columns put together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedlm.recipe.composition import PROTECTIONS, SILOS, Rule, Verdict, rules, verdicts
from fedlm.recipe.guards import MASK
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.tasks import TASKS

_INTRODUCTION = f"""\
# What can be combined

For each algorithm and task: the adapters that it trains, and what may happen to updates on their way. *nothing*: they
leave as they are. A guard's name: `guards: [{{name: ...}}]` with that guard alone. *privacy example*, *privacy user*,
*privacy silo*: `privacy.unit`, with `clip_norm: null` for the first two and `weights: equal` for the last two. *mask +
...*: both.

**yes**: the recipe loads. Numbers: it is refused, for the reasons below. **yes** and a number: only with what the note
says. `it` stands for the algorithm or task of the row, `this guard` and `this unit` for those of the column.

Each verdict comes from loading the smallest recipe of its kind, with {SILOS} silos, by the checks that every recipe
goes through, and a slow test runs a sample of what is allowed for every algorithm. What a recipe asks for besides may
be refused all the same: `fedlm recipe check` says it of yours, and `fedlm recipe matrix --algorithm NAME` tells of one
algorithm with the reasons in place.

*This page is written by `fedlm recipe matrix --out docs/composition.md`.*
"""

Cell = tuple[bool, tuple[str, ...]]
"""Whether a combination can be had, and the notes on it."""
Row = tuple[str, tuple[Cell, ...]]
"""The adapters, and a cell for each of `PROTECTIONS`."""


@dataclass(frozen=True)
class Table:
    """Rows of algorithms and tasks that are alike, and columns of protections that are."""

    columns: list[list[str]]
    rows: list[tuple[list[str], list[str], str, list[Cell]]]
    """(rules, tasks, adapters, cells)"""


def tabulate(algorithms: Iterable[str]) -> Table:
    """The verdicts on these algorithms."""
    alike: dict[tuple[Row, ...], list[str]] = defaultdict(list)
    for algorithm in algorithms:
        for rule in rules(algorithm):
            alike[tuple(_row(rule, task) for task in TASKS)].append(rule.name)
    parted: list[tuple[list[str], list[str], Row]] = []
    for found, names in alike.items():
        by_row: dict[Row, list[str]] = defaultdict(list)
        for task, row in zip(TASKS, found, strict=True):
            by_row[row].append(task)
        parted += [(names, tasks, row) for row, tasks in by_row.items()]
    by_column: dict[tuple[Cell, ...], list[int]] = defaultdict(list)
    for index in range(len(PROTECTIONS)):
        by_column[tuple(cells[index] for _, _, (_, cells) in parted)].append(index)
    first = [indices[0] for indices in by_column.values()]
    return Table(
        [[PROTECTIONS[index].name for index in indices] for indices in by_column.values()],
        [(names, tasks, kinds, [cells[index] for index in first]) for names, tasks, (kinds, cells) in parted],
    )


def _row(rule: Rule, task: str) -> Row:
    kinds, found = verdicts(rule, task)
    return ", ".join(kinds), tuple(_cell(verdict, kinds) for verdict in found)


def _cell(verdict: Verdict, kinds: Sequence[str]) -> Cell:
    """The names that differ between like cells are taken out of the reasons."""
    case = verdict.case
    if verdict.allowed:
        notes: tuple[str, ...] = ("only with `error_feedback: true`",) if case.error_feedback else ()
        if case.adapter != kinds[0]:
            notes += (f"only with `adapter.kind: {case.adapter}`",)
        return True, notes
    told = []
    for reason in verdict.reasons:
        text = reason.replace(f"'{case.rule.algorithm}'", "it").replace(f"'{case.task}'", "it")
        text = re.sub(r"^guards\.0(\.\w+)?", "guards", text).replace("task it", "it")
        if (unit := case.protection.unit) is not None:
            text = text.replace(f"'{unit}'", "this unit").replace(f"`privacy.unit: {unit}`", "this unit")
        text = text.replace(": it not with", ": not with").replace(": this unit not with", ": not with")
        text = re.sub(r" \((that can|methods that)[^)]*\)", "", text)  # the table says it
        if case.protection.guard not in (None, MASK):
            text = text.replace(f"'{case.protection.guard}'", "this guard")
        told.append(text)
    return False, tuple(dict.fromkeys(told))


def write_page() -> str:
    """The page as Markdown."""
    table = tabulate(ALGORITHMS)
    numbers: dict[str, int] = {}
    for _, _, _, cells in table.rows:
        for note in (note for _, notes in cells for note in notes):
            numbers.setdefault(note, len(numbers) + 1)
    heads = ["algorithms", "tasks", "adapters", *(", ".join(names) for names in table.columns)]
    lines = [_INTRODUCTION, f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    before: list[str] = []
    for names, tasks, kinds, cells in table.rows:
        shown = "" if names == before else _listed(names)
        before = names
        marks = [_mark(can, [numbers[note] for note in notes]) for can, notes in cells]
        lines.append(f"| {' | '.join([shown, ', '.join(tasks), kinds, *marks])} |")
    lines += ["", "## Notes", ""]
    lines += [f"{number}. {note}" for note, number in numbers.items()]
    return "\n".join([*lines, ""])


def _listed(rules: Sequence[str]) -> str:
    """Names of rules, those with the same option together."""
    by_option: dict[str, list[str]] = defaultdict(list)
    for name, _, option in (rule.partition(", ") for rule in rules):
        by_option[option].append(f"`{name}`")
    parts = [(f"with `{option}`: " if option else "") + ", ".join(names) for option, names in by_option.items()]
    return "; ".join(parts)


def _mark(can: bool, numbers: list[int]) -> str:
    told = ", ".join(map(str, sorted(numbers)))
    return f"yes {told}".strip() if can else told


def write_text(algorithm: str) -> str:
    """The verdicts on one algorithm, for a terminal."""
    table, lines = tabulate([algorithm]), []
    for names, tasks, kinds, cells in table.rows:
        told = f"{' / '.join(names)}, task {' or '.join(tasks)}"
        lines.append(f"{told}, adapter {kinds.replace(', ', ' or ')}:" if kinds else f"{told}:")
        for columns, (can, notes) in zip(table.columns, cells, strict=True):
            told = "; ".join(notes)
            lines.append(f"  {'yes' if can else 'no ':3}  {', '.join(columns)}" + (f": {told}" if told else ""))
    return "\n".join(lines) + "\n"
