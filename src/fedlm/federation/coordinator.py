"""The coordinator: runs rounds and never sees text.

A round is four steps: sample the silos, exchange the model for their updates and fold these as they arrive, take the
server step, validate and checkpoint. Whatever ends the process between two steps, the run continues from its last
checkpoint to the same final bits: sampling is keyed by the round, silos answer repeated requests from their stored
replies, and folding has one order.

With `oversample` or `deadline` the silos whose updates are used depend on who answers first; `replied` and `failures`
in rounds.jsonl are the record of that.

Memory does not grow with the number of silos: updates are folded one at a time; what is kept per silo is its name and
two integers.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Accumulator, Place, Step
from fedlm.algorithms.fedbuff import FedBuff
from fedlm.errors import RunError
from fedlm.federation.asynchronous import Flight, checkpoints_needed
from fedlm.federation.conversations import Conversations
from fedlm.federation.coverage import choose_centres
from fedlm.federation.disk import disk_errors
from fedlm.federation.folding import FoldResult
from fedlm.federation.interrupt import Interrupt
from fedlm.federation.masked import train_masked
from fedlm.federation.memory import MemorySampler
from fedlm.federation.noise import SumNoise
from fedlm.federation.records import (
    RunResult,
    Traffic,
    failure_lines,
    reasons,
    silo_line,
    summarise_run,
    training_figures,
    training_loss,
)
from fedlm.federation.representatives import choose_rows
from fedlm.federation.rundir import Checkpoint, Progress, RunDir
from fedlm.federation.sampling import invited, quorum, sample, wanted
from fedlm.federation.start import held_start
from fedlm.federation.versions import without_reserved
from fedlm.files import read_json, sync_folder, write_json
from fedlm.messages import Engine, Fields, Observe, Tensors
from fedlm.models.deltas import is_delta
from fedlm.recipe.guards import mask_of
from fedlm.recipe.methods import ALGORITHMS, PROMPTS
from fedlm.recipe.prompting import require_training
from fedlm.recipe.schema import Recipe


def run(
    recipe: Recipe,
    engine: Engine,
    run_dir: RunDir,
    *,
    observe: Observe | None = None,
    resume: bool = False,
    silos: Sequence[str] | None = None,
    final_test: bool = True,
    role: str = "validation",
) -> RunResult:
    """Run a federation from its start, or from its last checkpoint, to its end.

    Args:
        run_dir: opened for writing (see `RunDir`).
        silos: names that take part; all of the engine's by default.
        final_test: measure the base and the best model on the silos' test rows at the end.
        role: the rows that the model is measured on between rounds; 'test' is for comparisons over the whole course of
            training, which choose nothing by it.

    Raises:
        RunError: a round stays below its quorum, the disk fails, a checkpoint is corrupt. The state is kept; the run
            can be resumed.
        FedlmError: the model or the data cannot be loaded.
    """
    require_training(recipe)
    federation = Federation(recipe, engine, run_dir, observe, silos)
    federation.silos.role = role
    with Interrupt() as interrupt, MemorySampler() as memory:
        federation.interrupt, federation.memory = interrupt, memory
        try:
            return federation.run(resume, final_test)
        except KeyboardInterrupt:
            with interrupt.deferred():
                return federation.interrupted()
        except Exception:
            # The disk may be what failed: the error itself matters more than the status.
            federation.mark("failed")
            raise


@dataclass
class _State:
    """What a checkpoint holds: the global model, the server's tensors, and the progress."""

    parameters: Tensors
    server: Tensors
    progress: Progress = field(default_factory=lambda: Progress(round=-1))


class Federation:
    """One run. `run` tells its story; `one_round` is the heart."""

    interrupt: Interrupt
    memory: MemorySampler

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        run_dir: RunDir,
        observe: Observe | None = None,
        silos: Sequence[str] | None = None,
    ) -> None:
        self.recipe, self.spec, self.engine, self.dir = recipe, recipe.federation, engine, run_dir
        self.algorithm = get_algorithm(self.spec.algorithm, recipe.adapter)
        self.personal = ALGORITHMS[self.spec.algorithm.name].personal
        self.masks = mask_of(recipe) is not None
        self.noise: SumNoise | None = None
        """Where noise protects silos."""
        self.flight: Flight | None = None
        """What is under way in an asynchronous federation."""
        self.names = sorted(engine.silos() if silos is None else silos)
        self.start = held_start(run_dir, recipe)
        """What the run starts from, constant; no part of the global model."""
        self.silos = Conversations(recipe, engine, run_dir, self.algorithm, self.names, observe, self.start)

    # ---------------------------------------------------------------- the story

    def run(self, resume: bool, final_test: bool) -> RunResult:
        if resume and self.dir.meta["status"] == "finished":
            return self.result("finished", "this run had already finished; nothing was left to do")
        self.silos.tell(
            {"kind": "run_started", "rounds": self.spec.rounds, "silos": self.names, "run_dir": str(self.dir.path)}
        )
        self.meet()
        if isinstance(self.algorithm, FedBuff):
            self.flight = Flight(self.recipe, self.silos, self.dir, self.algorithm)
        state = self.restore() if resume else None
        self.mark("running")
        if state is None:
            state = self.begin()
        try:
            while state.progress.round + 1 < self.spec.rounds and not self.stale(state.progress):
                state = self.one_round(state)
        finally:
            if self.flight is not None:
                self.flight.close()
        evaluation = self.finish(state, final_test)
        result = self.result("finished", evaluation=evaluation)
        self.silos.tell(
            {"kind": "run_done", "status": "finished", "best_round": result.best_round, "evaluation": evaluation}
        )
        return result

    def meet(self) -> None:
        """Greet the silos, and settle with them what all rounds need."""
        self.silos.enrolled.greet()
        if self.recipe.privacy is not None and self.recipe.privacy.unit == "silo" and not self.masks:
            self.noise = self.silos.noise = SumNoise(self.recipe, self.dir, self.names)
        choose_rows(self.silos)
        choose_centres(self.silos)

    def begin(self) -> _State:
        """The first global model, measured before anything is trained (round -1 in rounds.jsonl)."""
        state = self.fresh()
        self.silos.check_guards(state.parameters)
        started = time.monotonic()
        traffic = Traffic()
        validation = self.silos.validate(self.evaluated(state), -1, traffic, {})
        self.record_round(-1, FoldResult(), validation, traffic, started, commit=self.dir.append_round)
        return state

    def one_round(self, state: _State) -> _State:
        """From one checkpoint to the next.

        Raises:
            RunError: fewer good updates than the quorum.
        """
        number, started, traffic = state.progress.round + 1, time.monotonic(), Traffic()

        # 1 and 2. Sample, exchange, fold. (In an asynchronous federation silos are at work across rounds.)
        self.silos.enrolled.greet_again()
        summed = self.masks or self.noise is not None
        accumulator = Accumulator() if summed else self.algorithm.accumulator(self.dir.spool)
        if self.flight is None:
            folded = self.collect(state, number, accumulator, traffic)
        else:
            folded = self.flight.collect(number, state.parameters, accumulator, traffic)
        figures: Fields = dict(folded.figures)
        if self.noise is not None:
            replies = [folded.fields[name] for name in folded.replied]
            figures |= self.noise.add(accumulator, number, state.parameters, replies)

        # 3. Server step: the folded updates become the next global model.
        stepping = time.monotonic()
        parameters, server = self.algorithm.server_step(
            state.parameters, accumulator, state.server, Step(number, len(self.silos.enrolled.trainers))
        )
        figures["server_seconds"] = time.monotonic() - stepping
        if self.silos.downlink is not None:  # what silos will load is the model from here on
            parameters = self.silos.downlink.rounded(state.parameters, parameters, number)
        before = (state.parameters, state.server)
        if not summed:  # a sum does not tell what each silo's update would have been, and noise shall not
            figures["aggregation"] = self.algorithm.measure(before, accumulator, (parameters, server), number)
        del accumulator

        # 4. Validate and checkpoint: from here on the round is done, whatever happens to this process.
        last = number + 1 == self.spec.rounds
        due = last or (number + 1) % self.recipe.evaluation.every == 0
        accepted = {**state.progress.accepted, **dict.fromkeys(folded.replied, number)}
        evaluated = self.algorithm.evaluated(parameters, server)
        validation = self.silos.validate(evaluated, number, traffic, accepted) if due else None
        progress = _advance(state.progress, number, accepted, validation, last=self.personal)
        following = _State(parameters, server, progress)
        if self.flight is not None:
            progress.flight = self.flight.dump()
        progress.clip = folded.clip if self.noise is None else self.noise.clip

        def commit(record: dict[str, Any]) -> None:
            progress.record = record
            held: Tensors = {}
            if self.silos.downlink is not None:
                progress.downlink, held = self.silos.downlink.dump()
            self.dir.save_checkpoint(Checkpoint(parameters, server | held, progress))
            self.dir.append_round(record)
            if self.spec.keep == "best-and-last":
                # The previous round stays until the end: it is the way back when the last one is damaged.
                before = state.progress
                started_from = checkpoints_needed(progress.flight) | checkpoints_needed(before.flight)
                self.dir.prune({number, number - 1, progress.best_round, before.best_round} | started_from)
            self.dir.update_meta(rounds_done=number + 1, best_round=_round_or_none(progress.best_round))

        self.record_round(number, folded, validation, traffic, started, commit, figures)
        return following

    def collect(self, state: _State, number: int, accumulator: Accumulator, traffic: Traffic) -> FoldResult:
        """A round's updates, folded.

        Raises:
            RunError: fewer good ones than the quorum.
        """
        # Sample: who takes part is keyed by the seed and the round alone.
        trainers = self.silos.enrolled.trainers
        want = wanted(self.spec, len(trainers))
        sampled = sample(trainers, invited(self.spec, len(trainers)), self.recipe.seed, "sample", number)
        self.silos.tell({"kind": "round_started", "round": number, "sampled": sampled})
        self.algorithm.asked(accumulator, sampled, Place("", number, self.spec.rounds, self.recipe.seed))

        # Exchange and fold: every silo gets the same tensors; updates are folded in canonical order as they arrive.
        broadcast = self.algorithm.broadcast(state.parameters, state.server, number)
        known = (broadcast, state.parameters, state.progress.accepted, accumulator, traffic)
        if self.masks:
            folded = train_masked(self.silos, number, sampled, *known, state.progress.clip)
        else:
            folded = self.silos.train(number, sampled, want, *known)
        needed = quorum(self.spec, want)
        if len(folded.replied) < needed:
            raise RunError(
                f"round {number} got {len(folded.replied)} good updates of {want} wanted, the quorum is {needed}: "
                + reasons(folded.failures),
                where=str(self.dir.path),
                fix="mend the silos and continue with --resume, or lower federation.quorum in a new run",
            )
        return folded

    def finish(self, state: _State, final_test: bool) -> dict[str, Any] | None:
        """Measure the best model on the test rows, save it as an adapter, tidy up."""
        from fedlm.models.adapters import base_tensors, completed
        from fedlm.models.export import save_adapter

        best = state.progress.best_round
        if best != state.progress.round:
            checkpoint = self.dir.load_checkpoint(best)
            assert checkpoint is not None
            state = _State(checkpoint.parameters, without_reserved(checkpoint.server_state), state.progress)
        evaluation = None
        if final_test and self.silos.enrolled.measured_rows["test"]:
            self.silos.phase("measuring the base and the best model on test rows")
            plain = self.recipe.adapter.kind in PROMPTS and not self.start  # a fresh prompt is no base model
            base = base_tensors(self.recipe) if plain else self.evaluated(self.fresh())
            evaluation = {
                "base": self.silos.measure(base, "test", -1, Traffic(), {}),
                "final": self.silos.measure(self.evaluated(state), "test", best, Traffic(), state.progress.accepted),
            }
            several = len(self.silos.enrolled.measured_rows["test"]) > 1
            if self.personal and several and not self.masks and not self.dir.meta.get("network"):
                evaluation["others"] = self.silos.measure(
                    self.evaluated(state), "test", best, Traffic(), state.progress.accepted, "others"
                )
        with self.interrupt.deferred(), disk_errors(self.dir.path):
            if evaluation is not None:
                write_json(self.dir.path / "evaluation.json", evaluation)
            temporary = self.dir.path / ".adapter.tmp"
            for folder in (temporary, self.dir.adapter):
                shutil.rmtree(folder, ignore_errors=True)
            exported = self.algorithm.exported(state.parameters, state.server)
            save_adapter(temporary, completed(exported, self.recipe, self.start), self.recipe)
            temporary.rename(self.dir.adapter)
            sync_folder(self.dir.path)
            if self.spec.keep == "best-and-last":
                self.dir.prune({best, state.progress.round})
            self.mark("finished")
        return evaluation

    # ---------------------------------------------------------------- state

    def fresh(self) -> _State:
        """The state before round 0, the same on every call."""
        from fedlm.models.adapters import initial_tensors
        from fedlm.models.principal import principal_tensors

        drawn = principal_tensors if ALGORITHMS[self.spec.algorithm.name].principal else initial_tensors
        values = {name: tensor.clone() for name, tensor in self.start.items() if not is_delta(name)}
        parameters = self.algorithm.initial(lambda: values or drawn(self.recipe))
        return _State(parameters, self.algorithm.init_state(parameters))

    def evaluated(self, state: _State) -> Tensors:
        return self.algorithm.evaluated(state.parameters, state.server)

    def restore(self) -> _State | None:
        """The state of the last checkpoint, or None when no round was finished yet.

        Raises:
            RunError: the checkpoint is corrupt; says how to go on from an earlier one.
        """
        checkpoint = self.dir.load_checkpoint()
        progress = checkpoint.progress if checkpoint else None
        back = any(r["round"] > (progress.round if progress else -1) for r in self.dir.iterate_rounds())
        if back or self.flight is not None:
            # Put back to an earlier round, or to answers that may come in another order: silos may be asked other
            # things than before, so the attempt is a new one.
            # Counted before the lines are dropped, so that a kill in between cannot lose it.
            self.dir.update_meta(restarts=int(self.dir.meta.get("restarts", 0)) + 1)
        self.dir.repair_rounds(progress)
        self.dir.update_meta(
            rounds_done=progress.round + 1 if progress else 0,
            best_round=_round_or_none(progress.best_round) if progress else None,
        )
        if checkpoint is None:
            return None
        self.silos.phase(f"continuing after round {checkpoint.progress.round}")
        if self.silos.downlink is not None:
            self.silos.downlink.load(checkpoint.progress.downlink, checkpoint.server_state)
        state = _State(checkpoint.parameters, without_reserved(checkpoint.server_state), checkpoint.progress)
        if self.noise is not None and state.progress.clip is not None:
            self.noise.clip = state.progress.clip
        if self.flight is not None:
            self.flight.load(state.progress.flight, lambda: self.fresh().parameters)
        return state

    def stale(self, progress: Progress) -> bool:
        """Early stopping: `patience` validated rounds without a better one."""
        if self.spec.patience is None or progress.stale < self.spec.patience:
            return False
        self.silos.phase(f"stopping early: {progress.stale} rounds without a better validation loss")
        return True

    # ---------------------------------------------------------------- telling

    def record_round(
        self,
        number: int,
        folded: FoldResult,
        validation: Fields | None,
        traffic: Traffic,
        started: float,
        commit: Callable[[dict[str, Any]], None],
        figures: Fields | None = None,
    ) -> None:
        """Build the round's object, commit it undisturbed by Ctrl-C, then tell."""
        absent, self.silos.enrolled.refused = self.silos.enrolled.refused, []
        record = {
            "round": number,
            "sampled": folded.asked,
            "replied": folded.replied,
            "failures": failure_lines([*absent, *folded.failures]),
            "loss": training_loss(folded),
            "figures": training_figures(folded),
            "silos": {name: silo_line(folded.fields[name]) for name in folded.replied},
            "validation": validation,
            "seconds": time.monotonic() - started,
            "bytes_up": traffic.up,
            "bytes_down": traffic.down,
            "peak_pss": self.memory.take(),
            **(figures or {}),
        }
        with self.interrupt.deferred():
            commit(record)
        self.silos.tell({"kind": "round_done", **record})

    def result(self, status: str, message: str = "", evaluation: dict[str, Any] | None = None) -> RunResult:
        file = self.dir.path / "evaluation.json"
        if evaluation is None and status == "finished" and file.exists():
            evaluation = read_json(file)
        return summarise_run(self.dir, status, message, evaluation)

    def interrupted(self) -> RunResult:
        """Ctrl-C: what was finished is on disk, silos keep the replies they have given."""
        self.mark("interrupted")
        done = self.dir.meta["rounds_done"]
        message = f"interrupted after {done} finished rounds; continue with: fedlm run --resume {self.dir.path}"
        self.silos.tell({"kind": "run_done", "status": "interrupted", "text": message})
        return self.result("interrupted", message)

    def mark(self, status: str) -> None:
        if status == "failed":
            try:
                self.dir.update_meta(status=status)
            except RunError:
                return
        else:
            self.dir.update_meta(status=status)


def _round_or_none(number: int) -> int | None:
    return number if number >= 0 else None


def _advance(
    before: Progress, number: int, accepted: dict[str, int], validation: Fields | None, *, last: bool
) -> Progress:
    """The progress after a round.

    Without validation rows anywhere the last round counts as the best; with `last` always, since silos keep their parts
    of personal models for the last rounds only.
    """
    loss = None if validation is None else validation.get("loss")
    progress = Progress(number, before.best_round, before.best_loss, before.stale, accepted)
    if loss is None:
        if before.best_loss is None:
            progress.best_round = number
    elif math.isfinite(loss) and (before.best_loss is None or loss < before.best_loss):
        progress.best_round, progress.best_loss, progress.stale = number, loss, 0
    else:
        progress.stale += 1
    if last:
        progress.best_round = number
    return progress
