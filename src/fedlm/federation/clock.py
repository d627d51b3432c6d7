"""Asynchronous federations: who gets work next, and whose answer counts next.

In a simulation a virtual clock says it: a training takes its optimiser steps times the silo's seconds per step, however
busy this machine is, so the order depends neither on workers nor on load. Over a network answers count as they come.
Either way the order stands in rounds.jsonl, and a run that follows such a log ends in the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.messages import Failure, FailureKind, Fields
from fedlm.randomness import numpy_generator
from fedlm.recipe.schema import Recipe
from fedlm.recipe.speeds import SpeedSpec
from fedlm.training.batches import steps_per_round
from fedlm.training.plan import Plan


@dataclass(frozen=True)
class Work:
    """One training that was given out."""

    dispatch: int
    """Its number in the run."""
    silo: str
    round: int
    """Server steps before the model that it starts from."""
    started: float
    """When, by the clock."""


class Clock:
    """Answers count in the order in which they come; who gets work is drawn by its number."""

    def __init__(self, recipe: Recipe) -> None:
        self.seed = recipe.seed
        self.patience = recipe.federation.deadline
        """Seconds that an engine waits for an answer."""
        self.dispatched = 0
        """Trainings given out so far."""
        self.now: float | None = None
        """Virtual seconds since the start; None where time is real."""

    def assign(self, round_: int, trainers: Sequence[str], taken: Collection[str], *, room: bool) -> Work | None:
        """The next training to give out; None when there is nobody for it, or no room.

        Args:
            round_: server steps so far.
            trainers: silos that can train, sorted.
            taken: those of them that shall get nothing now.
            room: whether fewer are at work than may be.
        """
        if not room or len(taken) >= len(trainers):
            return None
        generator = numpy_generator(self.seed, "dispatch", self.dispatched)
        while (silo := trainers[int(generator.integers(len(trainers)))]) in taken:
            pass
        self.dispatched += 1
        return Work(self.dispatched - 1, silo, round_, self.now or 0.0)

    def foregone(self, work: Work) -> Failure | None:  # noqa: ARG002
        """How this training ends where that is known beforehand; then nobody need be asked."""
        return None

    def due(self, flight: Iterable[Work]) -> Work | None:  # noqa: ARG002
        """Whose answer counts next; time moves on to it. None: whoever's comes first."""
        return None

    def dump(self) -> Fields:
        """What a checkpoint keeps."""
        return {"dispatched": self.dispatched, "now": self.now}

    def load(self, kept: Mapping[str, Any]) -> None:
        self.dispatched, self.now = kept["dispatched"], kept["now"]


class VirtualClock(Clock):
    """Time of a simulation.

    A training takes as many steps as its silo's training rows make (documents count as one sequence each), or as its
    plan says. `federation.deadline` is in seconds of this clock.

    Args:
        rows: by silo, its number of training rows.
        plan: what a silo does of a round; by default all that the recipe asks.
    """

    def __init__(self, recipe: Recipe, rows: Mapping[str, int], plan: Callable[[str], Plan] = lambda _: Plan()) -> None:
        super().__init__(recipe)
        self.now, self.patience = 0.0, None
        self.spec, self.training, self.rows, self.plan = recipe.federation.speeds, recipe.training, rows, plan
        self.deadline = math.inf if recipe.federation.deadline is None else recipe.federation.deadline

    def seconds(self, silo: str) -> float:
        """How long a training of this silo takes."""
        plan, each = self.plan(silo), seconds_per_step(self.spec, self.seed, silo)
        rows = self.rows[silo]
        steps = steps_per_round(plan.training(self.training, rows), rows)
        if plan.seconds is not None:
            steps = min(steps, steps_within(plan.seconds, each))
        return each * steps

    def foregone(self, work: Work) -> Failure | None:
        if self.seconds(work.silo) <= self.deadline:
            return None
        return Failure(work.silo, FailureKind.TIMED_OUT, f"no reply within {self.deadline:g} seconds")

    def due(self, flight: Iterable[Work]) -> Work | None:
        def end(work: Work) -> tuple[float, int]:
            return work.started + min(self.seconds(work.silo), self.deadline), work.dispatch

        first = min(flight, key=end)
        self.now = end(first)[0]
        return first


class RecordedOrder(Clock):
    """The order of another run's log: what was given out when, what became of it, and when it counted.

    Nobody is asked to train what did not count in the end: what failed fails again.

    Args:
        log: its rounds.jsonl.

    Raises:
        RunError: it cannot be read, or holds no order of answers.
    """

    def __init__(self, recipe: Recipe, log: Path) -> None:
        super().__init__(recipe)
        self.log, self.patience = log, None
        self.counted = 0
        """Answers taken from the log so far."""
        arrivals: list[dict[str, Any]] = []
        try:
            with log.open() as file:
                for line in file:
                    arrivals += json.loads(line).get("arrivals", [])
            self.given = sorted((int(a["dispatch"]), str(a["silo"]), int(a["round"])) for a in arrivals)
            self.failed = {int(a["dispatch"]): FailureKind(a["failure"]) for a in arrivals if a["failure"]}
        except OSError as error:
            raise RunError(f"the log of answers cannot be read ({error.strerror})", where=str(log)) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RunError("the log of answers is damaged", where=str(log)) from None
        if not arrivals:
            raise RunError("the log holds no order of answers", where=str(log), fix="name an asynchronous run's")
        self.order = [a["dispatch"] for a in arrivals if a["failure"] != FailureKind.STALE]

    def assign(self, round_: int, trainers: Sequence[str], taken: Collection[str], *, room: bool) -> Work | None:  # noqa: ARG002
        if self.dispatched >= len(self.given):
            return None
        dispatch, silo, given_in = self.given[self.dispatched]
        if silo not in trainers:
            raise self._unfit(f"it asks the silo '{silo}', which does not train here")
        if given_in != round_ or silo in taken:
            return None
        self.dispatched += 1
        return Work(dispatch, silo, round_, 0.0)

    def foregone(self, work: Work) -> Failure | None:
        kind = self.failed.get(work.dispatch)
        if kind is None:
            return None
        return Failure(work.silo, kind, "so it was in the recorded run")

    def due(self, flight: Iterable[Work]) -> Work | None:
        if self.counted == len(self.order):
            raise self._unfit(f"it ends after {self.counted} answers, before this run does")
        dispatch = self.order[self.counted]
        work = next((work for work in flight if work.dispatch == dispatch), None)
        if work is None:
            raise self._unfit(f"its answer {dispatch} comes where this run has not asked for it")
        self.counted += 1
        return work

    def dump(self) -> Fields:
        return {**super().dump(), "counted": self.counted}

    def load(self, kept: Mapping[str, Any]) -> None:
        super().load(kept)
        self.counted = kept["counted"]

    def _unfit(self, why: str) -> RunError:
        fix = "follow it with the recipe of the run that wrote it, but for speeds and workers"
        return RunError(f"the log does not fit this run: {why}", where=str(self.log), fix=fix)


def steps_within(seconds: float, each: float) -> int:
    """Optimiser steps that end in time; never fewer than one.

    >>> steps_within(6.0, 2.5), steps_within(1.0, 2.5)
    (2, 1)
    """
    return max(1, int(seconds / each))


def seconds_per_step(spec: SpeedSpec, seed: int, silo: str) -> float:
    """Seconds of an optimiser step in this silo, the same in the whole run.

    >>> seconds_per_step(SpeedSpec(kind="fixed", silos={"slow": 10.0}), 0, "slow")
    10.0
    """
    if silo in spec.silos:
        return spec.silos[silo]
    generator = numpy_generator(seed, "speed", silo)
    match spec.kind:
        case "lognormal":
            return spec.seconds * math.exp(spec.sigma * generator.standard_normal())
        case "pareto":
            return float(spec.seconds * (1.0 - generator.random()) ** (-1.0 / spec.shape))
        case _:
            return spec.seconds
