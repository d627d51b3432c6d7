"""Asynchronous rounds: silos train at their own pace, and a round is a server step.

A fixed number of silos is at work at any time. Whoever answers gets new work at once, from the newest model; as soon as
the algorithm has its number of updates the server steps. Nobody waits for a slow silo: its update counts when it comes,
by its staleness, or not at all once that is beyond `max_staleness`, when the silo is stopped and gets new work.

Answers are folded in the order of a clock (`fedlm.federation.clock`), so a run is repeatable. A checkpoint says what is
under way and when it is; the models that it started from are checkpoints themselves, kept as long as they are needed.
A resumed run asks for the same work again.

A silo whose training fails gets nothing more in this round, another takes its place. It counts as not alive until it
gives a good update again, and the run stops when fewer silos than the quorum are alive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlm.algorithms.base import Accumulator
from fedlm.algorithms.fedbuff import FedBuff
from fedlm.errors import RunError
from fedlm.evaluation.summary import added
from fedlm.federation.clock import Clock, RecordedOrder, VirtualClock, Work
from fedlm.federation.conversations import Conversations
from fedlm.federation.folding import FoldResult, Verdict, Waiting, judge
from fedlm.federation.records import PLANNED, Traffic, reasons
from fedlm.federation.rundir import RunDir
from fedlm.federation.sampling import invited, quorum
from fedlm.messages import Failure, FailureKind, Fields, Reply, Request, Stop, Tensors
from fedlm.recipe.checks import too_stale
from fedlm.recipe.schema import Recipe

SUMS = ("examples", "tokens", "target_tokens", "loss_count", "steps", "seconds", "sent_bytes", "received_bytes")
"""Figures of a training that add up over several of one silo."""


@dataclass
class _Asked:
    """A training that a silo was asked for."""

    work: Work
    start: Tensors
    """The global model that it starts from, which is all that travels."""
    stop: Stop = field(default_factory=Stop)
    thread: threading.Thread | None = None


class Flight:
    """What is under way in one run.

    Raises:
        RunError: more silos shall work at once than there are; even equally fast ones could not keep within the
            staleness bound; or what the clock refuses.
    """

    def __init__(self, recipe: Recipe, silos: Conversations, run_dir: RunDir, algorithm: FedBuff) -> None:
        self.spec, self.silos, self.dir, self.algorithm = recipe.federation, silos, run_dir, algorithm
        at_once, known = self.spec.concurrency, len(silos.names)
        if isinstance(at_once, int) and at_once > known:  # a recipe need not say how many silos its data makes
            raise RunError(
                f"{at_once} silos cannot work at once where there are {known}",
                where="federation.concurrency",
                fix=f"give at most {known}, or 'all'",
            )
        if problem := too_stale(self.spec, len(silos.enrolled.trainers)):
            raise RunError(problem, where="federation.algorithm.max_staleness", fix="raise it, or lower concurrency")
        self.clock = choose_clock(recipe, silos, run_dir)
        self._asked: dict[int, _Asked] = {}
        self._answers: dict[int, Reply | Failure] = {}
        """Answers whose turn has not come, in the order in which they came; their tensors wait elsewhere."""
        self._arriving: queue.SimpleQueue[tuple[int, Reply | Failure | BaseException]] = queue.SimpleQueue()
        self._waiting = Waiting(run_dir.spool)
        self._lock = threading.Lock()
        """Guards what is waiting, and what is asked against answers that come too late."""
        self._down: dict[str, Failure] = {}
        """Silos whose last training failed."""
        self._aside: set[str] = set()
        """Silos that get nothing more in this round."""

    # ---------------------------------------------------------------- a round

    def collect(self, number: int, parameters: Tensors, accumulator: Accumulator, traffic: Traffic) -> FoldResult:
        """Keep silos at work until the server has the updates for its next step.

        Args:
            number: of the round: server steps so far.
            parameters: the global model.
            accumulator: receives the updates.
            traffic: receives the bytes of what was answered.

        Raises:
            RunError: fewer silos are alive than the quorum; or the engine, the disk or the clock fail.
        """
        wanted = self.spec.algorithm.updates_per_step()
        self.silos.tell({"kind": "round_started", "round": number, "wanted": wanted})
        result, arrivals = FoldResult(), list[Fields]()

        def note(work: Work, failure: Failure | None) -> None:
            arrivals.append(
                {
                    "dispatch": work.dispatch,
                    "silo": work.silo,
                    "round": work.round,
                    "staleness": number - work.round,
                    "failure": failure and failure.kind.value,
                }
            )
            if failure is not None:
                result.failures.append(failure)
                self.silos.failed(number, failure)

        def check(reply: Reply) -> Verdict:
            return self.silos.verdict(reply, parameters)

        self._aside.clear()
        for asked in self._beyond(number):
            note(asked.work, self._give_up(asked, number))
        while accumulator.count < wanted:
            self._give_out(number, parameters)
            asked, answer = self._next()
            work = asked.work
            if isinstance(answer, Reply):
                traffic.add(answer)
                self.silos.done(number, answer)
                answer = self.silos.opened(answer, parameters, work.dispatch)
            verdict = judge(answer, check)
            if isinstance(verdict, Failure):
                note(work, verdict)
                self._set_aside(number, verdict)
                continue
            assert isinstance(answer, Reply)
            place = replace(verdict.place, dispatch=work.dispatch, staleness=number - work.round)
            update = self.algorithm.counted(answer.tensors, place, asked.start, parameters)
            self.algorithm.fold(accumulator, update, verdict.weight, place)
            note(work, None)
            self._down.pop(work.silo, None)
            _enter(result, work.silo, answer.fields, verdict.weight)
            del answer, update  # not to be held while the next one is awaited
        result.asked, result.replied = sorted({a["silo"] for a in arrivals}), sorted(result.fields)
        result.figures = {"arrivals": arrivals, "clock": self.clock.now}
        return result

    def _give_out(self, number: int, parameters: Tensors) -> None:
        """Give work to silos until as many are at work as may be."""
        trainers = self.silos.enrolled.trainers
        most = invited(self.spec, len(trainers))
        while True:
            busy = {asked.work.silo for asked in self._asked.values()}
            work = self.clock.assign(number, trainers, busy | self._aside, room=len(self._asked) < most)
            if work is None:
                return
            self._ask(work, parameters)

    def _beyond(self, number: int) -> list[_Asked]:
        """What is under way and could not count any more."""
        most = self.spec.algorithm.max_staleness
        return [asked for asked in self._asked.values() if number - asked.work.round > most]

    def _give_up(self, asked: _Asked, number: int) -> Failure:
        """Stop a training that no longer counts."""
        work, most = asked.work, self.spec.algorithm.max_staleness
        with self._lock:
            del self._asked[work.dispatch]
            self._answers.pop(work.dispatch, None)
            self._waiting.drop(str(work.dispatch))
        asked.stop.now()
        late = number - work.round
        return Failure(work.silo, FailureKind.STALE, f"staleness beyond the bound: {late} server steps, {most} allowed")

    def _set_aside(self, number: int, failure: Failure) -> None:
        self._aside.add(failure.silo)
        self._down[failure.silo] = failure
        total = len(self.silos.enrolled.trainers)
        alive, needed = total - len(self._down), quorum(self.spec, total)
        if alive < needed:
            raise RunError(
                f"round {number}: {alive} of {total} silos are alive, the quorum is {needed}: "
                + reasons(list(self._down.values())),
                where=str(self.dir.path),
                fix="mend the silos and continue with --resume, or lower federation.quorum in a new run",
            )

    # ---------------------------------------------------------------- asking

    def _ask(self, work: Work, start: Tensors) -> None:
        asked = _Asked(work, start)
        self._asked[work.dispatch] = asked
        if (failure := self.clock.foregone(work)) is not None:
            self._arriving.put((work.dispatch, failure))
            return
        # No state is kept in silos, so no earlier round is named as the accepted one.
        fields = {"round": work.round, "rounds": self.spec.rounds, "accepted": -1, "dispatch": work.dispatch}
        request = self.silos.request(work.silo, "train", work.round, start, fields)
        asked.thread = threading.Thread(
            target=self._wait_for, args=(asked, request), name=f"fedlm-training-{work.dispatch}", daemon=True
        )
        asked.thread.start()

    def _wait_for(self, asked: _Asked, request: Request) -> None:
        """In a thread of its own: hear one silo's answer, whose tensors wait in a bounded memory or on disk."""
        number = asked.work.dispatch
        answer: Reply | Failure | BaseException
        try:
            (answer,) = self.silos.engine.exchange([request], self.clock.patience, asked.stop)
            if isinstance(answer, Reply):
                with self._lock:
                    if number in self._asked:
                        self._waiting.put(str(number), number, answer.tensors, ready=False)
                answer = replace(answer, tensors={})
        except BaseException as error:  # raised again where the run waits
            answer = error
        self._arriving.put((number, answer))

    def _next(self) -> tuple[_Asked, Reply | Failure]:
        """Wait for the answer that counts next."""
        due = self.clock.due(asked.work for asked in self._asked.values())
        while True:
            number = next((n for n in self._answers if due is None or n == due.dispatch), None)
            if number is not None:
                break
            arrived, what = self._arriving.get()
            if arrived not in self._asked:  # given up meanwhile
                continue
            if isinstance(what, BaseException):
                raise what
            self._answers[arrived] = what
        answer = self._answers.pop(number)
        with self._lock:
            asked = self._asked.pop(number)
            if isinstance(answer, Reply):
                answer = replace(answer, tensors=self._waiting.take(str(number)))
        return asked, answer

    # ---------------------------------------------------------------- across processes

    def dump(self) -> Fields:
        """What a checkpoint keeps of this moment."""
        return {**self.clock.dump(), "work": [asdict(asked.work) for asked in self._asked.values()]}

    def load(self, kept: Mapping[str, Any], first: Callable[[], Tensors]) -> None:
        """Ask again for what a checkpoint says was under way.

        Args:
            first: gives the global model before round 0; those before the others lie in checkpoints.

        Raises:
            RunError: a checkpoint is corrupt.
        """
        self.clock.load(kept)
        works = [Work(**item) for item in kept["work"]]
        sent: dict[int, Tensors] = {}
        for round_ in {work.round for work in works}:
            checkpoint = self.dir.load_checkpoint(round_ - 1) if round_ else None
            sent[round_] = checkpoint.parameters if checkpoint else first()
        for work in works:
            self._ask(work, sent[work.round])

    def close(self) -> None:
        """Stop all that is under way."""
        for asked in self._asked.values():
            asked.stop.now()
        for asked in self._asked.values():
            if asked.thread is not None:
                asked.thread.join()
        self._asked.clear()
        self._answers.clear()
        self._waiting.clear()


def checkpoints_needed(kept: Mapping[str, Any]) -> set[int]:
    """Rounds whose checkpoints hold the models that the work of a `Flight.dump` started from."""
    return {item["round"] - 1 for item in kept.get("work", [])}


def choose_clock(recipe: Recipe, silos: Conversations, run_dir: RunDir) -> Clock:
    """Raises RunError: see the clocks."""
    if (log := recipe.federation.speeds.log) is not None:
        return RecordedOrder(recipe, Path(run_dir.meta["base"]) / log)
    if run_dir.meta.get("network"):
        return Clock(recipe)
    return VirtualClock(recipe, silos.enrolled.training_rows, silos.plan)


def _enter(result: FoldResult, silo: str, fields: Fields, weight: float) -> None:
    """Enter a training's figures; several of one silo in a round stand as one."""
    before = result.fields.get(silo)
    result.weights[silo] = result.weights.get(silo, 0.0) + weight
    if before is None:
        result.fields[silo] = fields
        return
    both = {**fields, **{name: before[name] + fields[name] for name in SUMS if name in fields}}
    both["figures"] = {name: list(pair) for name, pair in added((before["figures"], fields["figures"])).items()}
    both["loss"] = sum(f["loss"] * f["loss_count"] for f in (before, fields)) / max(both["loss_count"], 1)
    if PLANNED in before or PLANNED in fields:
        both[PLANNED] = sum(f.get(PLANNED, f["steps"]) for f in (before, fields))
    both["peak_rss"] = max(before["peak_rss"], fields["peak_rss"])
    result.fields[silo] = both
