"""Tune and report every row, side by side, going on where an earlier call stopped.

OUT of a bench:

    bench.json                  settings, rows, claims: what the tables are written from
    data.json                   a fingerprint of the silos' rows
    results/ROW-HASH.json       figures of one finished training; the hash is that of its recipe
    work/ROW-HASH.PID/          a training under way, or the log of one that failed in the last call

A training with a result is never run again. One that was cut short, or failed, begins anew when the bench goes on.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlm.comparison.bench.claims import judge_claims
from fedlm.comparison.bench.jobs import Ended, run_all
from fedlm.comparison.bench.plan import REPORTING, TUNING, Base, Job, jobs_of, rates
from fedlm.comparison.bench.rows import Row
from fedlm.comparison.bench.table import base_figures, best_rate, compared, row_figures
from fedlm.errors import RecipeError, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.engines.local import resolve_workers
from fedlm.federation.interrupt import Interrupt
from fedlm.federation.rundir import RunDir
from fedlm.files import read_json, write_json
from fedlm.messages import Fields, Observe
from fedlm.recipe.load import dump_recipe, load_recipe

SCHEMA = 1


@dataclass(frozen=True)
class Settings:
    """What is asked of every row alike."""

    seeds: Sequence[int] = (1, 2, 3)
    tuning_seeds: Sequence[int] = (0,)
    rates: int = 3
    """Learning rates that are tried for each row."""
    budgets: Sequence[float] | None = None
    """Bytes at which rows are compared; see `table.compared`."""

    def __post_init__(self) -> None:
        if both := set(self.seeds) & set(self.tuning_seeds):
            raise RunError(
                f"seed {min(both)} would both choose the learning rates and report the result",
                where="--tuning-seeds",
                fix="keep the tuning seeds apart from the reporting seeds",
            )
        if not self.seeds or not self.tuning_seeds or self.rates < 1:
            raise RunError("a bench needs at least one seed, one tuning seed and one learning rate", where="--seeds")


@dataclass
class _RowState:
    """How far a row has come."""

    row: Row
    waiting: int
    """Tuning trainings that have not ended."""
    tuned: dict[float, list[float]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[float, str] = field(default_factory=dict)
    """Learning rates of which a training failed, with the reason."""
    rate: float | None = None
    at_edge: bool = False
    reported: dict[int, Fields] = field(default_factory=dict)
    reason: str = ""
    """Why there is no result."""


def bench(
    file: Path,
    overrides: Sequence[str],
    rows: Sequence[Row],
    settings: Settings,
    *,
    out: Path,
    observe: Observe | None = None,
    workers: int | None = None,
    resume: bool = False,
    must: bool = False,
) -> Fields:
    """Run all rows on the recipe's work.

    Args:
        file: the recipe; its algorithm is replaced by each row's.
        overrides: `--set` of every row.
        observe: receives the trainings' events with "arm" added, and "training_done" for each that ends.
        workers: trainings side by side; by default as many as the recipe's silos would work.
        resume: go on in `out`; without it `out` must be new.
        must: every row was asked for by name, so one that the recipe excludes is an error.

    Returns:
        What bench.json holds: {"schema", "settings", "recipe", "base", "rows", "reference", "budgets",
        "frontier", "claims", "seconds"}; a row that failed has "reason" in place of figures.

    Raises:
        RunError: `out` is taken, or holds another bench's data.
        RecipeError, DataError: the recipe or its text cannot be used.
        KeyboardInterrupt: everything that was finished is kept.
    """
    from fedlm.data.federated import load_data

    started = time.monotonic()
    recipe = load_recipe(file, overrides)
    with Interrupt():
        data = load_data(recipe, file.parent)
        base = Base(file, tuple(overrides), recipe, len(data.names), data.names[0])
        states = _plan(base, rows, settings, must)
        _check_directory(out, data.fingerprint, resume)
        with disk_errors(out):
            (out / "results").mkdir(parents=True, exist_ok=True)
            lock = RunDir(out)
            lock.lock()
            write_json(out / "data.json", {"schema": SCHEMA, "data": data.fingerprint})
        try:
            one = _Bench(base, states, settings, out, data.fingerprint, observe)
            total = sum(state.waiting + len(settings.seeds) for state in states if not state.reason)
            size = (
                resolve_workers(recipe.federation, max(total, 1), recipe.model.device) if workers is None else workers
            )
            del data
            one.run(total, size)
            outcome = one.outcome(time.monotonic() - started)
            with disk_errors(out):
                write_json(out / "bench.json", outcome)
        finally:
            lock.close()
    return outcome


def _plan(base: Base, rows: Sequence[Row], settings: Settings, must: bool) -> list[_RowState]:
    """Rows whose recipe is impossible are kept, with the reason.

    Raises:
        RecipeError: one is, and `must`.
    """
    states = []
    for row in rows:
        state = _RowState(row, settings.rates * len(settings.tuning_seeds))
        try:
            jobs_of(base, row, rates(base, row, settings.rates)[:1], settings.seeds[:1], TUNING)
        except RecipeError as error:
            if must:
                raise
            state.reason, state.waiting = f"not possible with this recipe: {error.sentence()}", 0
        states.append(state)
    return states


def _check_directory(out: Path, fingerprint: str, resume: bool) -> None:
    file = out / "data.json"
    if not file.exists():
        if out.is_dir() and any(out.iterdir()):
            raise RunError("this folder is not empty and holds no bench", where=str(out), fix="choose another --out")
        return
    if not resume:
        raise RunError(
            "this folder already holds a bench",
            where=str(out),
            fix="go on with it with --resume, or choose another --out",
        )
    if read_json(file)["data"] != fingerprint:
        raise RunError(
            "the data has changed since this bench began: its rows, their silos or their roles are others",
            where=str(out),
            fix="put the data back, or choose another --out",
        )


class _Bench:
    def __init__(
        self,
        base: Base,
        states: Sequence[_RowState],
        settings: Settings,
        out: Path,
        fingerprint: str,
        observe: Observe | None,
    ) -> None:
        self.base, self.settings, self.out, self.data = base, settings, out, fingerprint
        self.states = {state.row.name: state for state in states}
        self._observe = observe
        self._done = self._total = 0

    def run(self, total: int, size: int) -> None:
        """All trainings that have no result yet."""
        self._total = total
        jobs = []
        for state in self.states.values():
            if not state.reason:
                lrs = rates(self.base, state.row, self.settings.rates)
                jobs += self.missing(jobs_of(self.base, state.row, lrs, self.settings.tuning_seeds, TUNING))
        run_all(jobs, self.done, base=self.base.file.parent, folder=self.out / "work", size=size, observe=self._observe)

    def missing(self, jobs: Iterable[Job]) -> list[Job]:
        """Those without a result; the results of the others are taken in."""
        found = []
        for job in jobs:
            file = self._file(job)
            if file.exists():
                found += self.take(job, Ended(read_json(file)["figures"]), stored=True)
            else:
                found.append(job)
        return found

    def done(self, job: Job, ended: Ended) -> list[Job]:
        """Keep the result; what can be run now."""
        if ended.figures is not None:
            about = {"schema": SCHEMA, "row": job.row.name, "lr": job.lr, "seed": job.seed, "role": job.role}
            with disk_errors(self.out):
                write_json(self._file(job), {**about, "figures": ended.figures})
        return self.take(job, ended)

    def take(self, job: Job, ended: Ended, stored: bool = False) -> list[Job]:
        state = self.states[job.row.name]
        self._done += 1
        if job.role == REPORTING:
            if ended.figures is None:
                state.reason = state.reason or f"{job.label}: {ended.reason}"
            else:
                state.reported[job.seed] = ended.figures
            self._tell(job, ended, stored)
            return []
        state.waiting -= 1
        if ended.figures is None:
            state.failed[job.lr] = ended.reason
        else:
            state.tuned[job.lr].append(ended.figures["points"][-1]["loss"])
        if not state.waiting:
            self._choose_rate(state)
        self._tell(job, ended, stored)
        if state.rate is None:
            return []
        return self.missing(jobs_of(self.base, state.row, [state.rate], self.settings.seeds, REPORTING))

    def _choose_rate(self, state: _RowState) -> None:
        finished = {lr: losses for lr, losses in state.tuned.items() if lr not in state.failed}
        if finished:
            state.rate, state.at_edge = best_rate(finished)
        else:
            lr, reason = next(iter(state.failed.items()))
            state.reason = f"no learning rate could be trained with; with {lr:.3g}: {reason}"
            self._total -= len(self.settings.seeds)

    def outcome(self, seconds: float) -> Fields:
        """bench.json."""
        good: dict[str, Fields] = {}
        rows: list[Fields] = []
        for name, state in self.states.items():
            row, facts = state.row, state.row.facts
            about: Fields = {
                "name": name,
                "method": row.method,
                "group": row.group,
                "paper": facts.paper,
                "personal": facts.personal,
                "note": row.note,
                "rate": state.rate,
                "server_rate": row.server_lr is not None,
                "at_edge": state.at_edge,
                "tuned": {f"{lr:.3g}": losses for lr, losses in state.tuned.items()},
                "failed_rates": {f"{lr:.3g}": reason for lr, reason in state.failed.items()},
            }
            if not state.reason:
                good[name] = row_figures(state.reported)
            else:
                about["reason"] = state.reason
            rows.append(about)
        shared = compared(good, self.settings.budgets)
        for about in rows:
            about |= good.get(about["name"], {})
        runs = [run for state in self.states.values() for run in state.reported.values()]
        return {
            "schema": SCHEMA,
            "name": self.base.recipe.name,
            "recipe": dump_recipe(self.base.recipe),
            "silos": self.base.silos,
            "settings": {
                "seeds": list(self.settings.seeds),
                "tuning_seeds": list(self.settings.tuning_seeds),
                "rates": self.settings.rates,
            },
            "base": base_figures(runs[0]) if runs else None,
            "rows": rows,
            **shared,
            "claims": judge_claims(good),
            "seconds": seconds,
        }

    def _file(self, job: Job) -> Path:
        return self.out / "results" / f"{job.name}.json"

    def _tell(self, job: Job, ended: Ended, stored: bool) -> None:
        if self._observe is None:
            return
        event: dict[str, Any] = {"kind": "training_done", "arm": job.label, "done": self._done, "total": self._total}
        event |= {"stored": stored, "reason": ended.reason, "role": job.role}
        if ended.figures is not None:
            event |= {"loss": ended.figures["points"][-1]["loss"], "seconds": ended.figures["wall_seconds"]}
        self._observe(event)
