"""What a rule may do with its silo's model and rows during one round: `fedlm.algorithms.base.Session`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from torch.nn import Module, Parameter

from fedlm.algorithms.base import LocalRule, Place
from fedlm.errors import TrainingError
from fedlm.federation.clock import steps_within
from fedlm.messages import Event, Observe, Tensors
from fedlm.randomness import numpy_generator
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS
from fedlm.training.plan import Plan

if TYPE_CHECKING:
    from fedlm.federation.silo.private import PrivateRound
    from fedlm.federation.silo.reference import Reference
    from fedlm.federation.silo.workbench import Workbench
    from fedlm.training.encode import TokenSet
    from fedlm.training.loop import TrainResult
    from fedlm.training.objective import Objective


class TimeBudget:
    """Ends a round's training before the step that would end too late, if it takes as long as those before it did; a
    training's first step is always taken.

    Args:
        seconds: for all steps of the round.
        per_step: seconds of a step where time is virtual; None for the time it really takes.
    """

    def __init__(self, seconds: float, per_step: float | None) -> None:
        self.seconds, self.per_step = seconds, per_step
        self._steps, self._first, self._began = 0, True, time.monotonic()

    def begin(self) -> None:
        """A training begins: its first step is taken in any case."""
        self._first = True

    def spent(self) -> bool:
        """Asked before every step: whether there is no time for it."""
        if not self._first and not self._in_time():
            return True
        self._first = False
        self._steps += 1
        return False

    def _in_time(self) -> bool:
        if self.per_step is not None:
            return self._steps < steps_within(self.seconds, self.per_step)
        return (time.monotonic() - self._began) * (self._steps + 1) / self._steps <= self.seconds


class SiloSession:
    """One silo's round on the workbench; with `private`, a rule trains once, by noised gradients, and measures nothing.

    Attributes:
        optimizer: what is kept between rounds (moments, what the spike guard remembers), of all trainings of this
            round; empty unless the recipe keeps it.
    """

    def __init__(
        self,
        bench: Workbench,
        place: Place,
        optimizer: Tensors,
        observe: Observe | None,
        should_stop: Callable[[], bool],
        plan: Plan,
        budget: TimeBudget | None = None,
        *,
        reference: Reference | None = None,
        tokens: TokenSet | None = None,
        private: PrivateRound | None = None,
    ) -> None:
        self.place, self._bench, self._observe, self._should_stop = place, bench, observe, should_stop
        self._plan, self._budget, self._private = plan, budget, private
        self._moments = optimizer
        self.optimizer: Tensors = {}
        self.tokens: TokenSet = bench.training_tokens(place.silo) if tokens is None else tokens
        self._reference = reference
        if bench.task.compares or bench.task.embeds:
            assert reference is not None, "the task compares with a reference, or learns from its states"
            self.tokens = reference.beside(self.tokens)
        self.recipe: Recipe = plan.recipe(bench.recipe, len(self.tokens))
        self.model: Module = bench.model

    def put(self, tensors: Tensors) -> dict[str, Parameter]:
        """Load these values into the model; the adapter's parameters by name."""
        return self._bench.put(tensors)

    def train(self, rule: LocalRule, *, purpose: str = "") -> tuple[TrainResult, Tensors]:
        """Ordinary training from `rule.start()`; what happened, and the trained values (fp32, CPU)."""
        from fedlm.training.loop import Window

        start = rule.start()
        chosen = self._bench.choose(self.put(start), lambda name: rule.trains(name) and self._plan.trains(name))
        if self._budget is not None:
            self._budget.begin()
        prefix = f"{purpose}:" if purpose else ""
        # A silo may start from the same model twice, and then sees other batches.
        dispatch = () if self.place.dispatch is None else ("dispatch", self.place.dispatch)
        result = self._trainer(rule, purpose, chosen)(
            self.model,
            chosen,
            self.tokens,
            self.recipe.training,
            Window(self.place.round, self.place.rounds),
            generator_key=(self.recipe.seed, self.place.silo, *([purpose] if purpose else []), *dispatch),
            optimizer_state={
                name.removeprefix(prefix): moments
                for name, moments in self._moments.items()
                if name.startswith(prefix) and (prefix or ":" not in name)
            },
            observe=self._observe,
            silo=self.place.silo,
            should_stop=lambda: self._should_stop() or (self._budget is not None and self._budget.spent()),
        )
        self.optimizer |= {prefix + name: moments for name, moments in result.optimizer_state.items()}
        return result, self._bench.take(chosen)

    def _trainer(self, rule: LocalRule, purpose: str, chosen: dict[str, Parameter]) -> Callable[..., TrainResult]:
        """The local loop in one process, with a team, or with weights in shards."""
        from fedlm.training.loop import train

        if self._private is not None:
            trainer = self._private.trainer(self.tokens)
            return partial(trainer, rule=rule, objective=self.objective(purpose))
        if self._plan.shards is None:
            team = self._bench.team(self._plan.processes or 1, chosen)
            return partial(train, rule=rule, objective=self.objective(purpose), team=team)
        from fedlm.training.sharded import train_sharded

        if rule.between_steps:
            raise TrainingError(
                "weights in shards are trained plainly, and this rule changes whole ones between steps",
                where=f"silo '{self.place.silo}'",
                fix="give `processes` in place of `shards` in the silo's capacity",
            )
        return partial(train_sharded, team=self._bench.sharded(self._plan.shards))

    def objective(self, purpose: str = "") -> Objective:
        """What this round minimises.

        Args:
            purpose: of a training among several of one round, which draws for itself.
        """
        from fedlm.training.objective import Tools

        place = self.place
        key: tuple[str | int, ...] = (self.recipe.seed, place.silo, *([purpose] if purpose else []), place.round)
        inside = None if self._reference is None else self._reference.inside
        return self._bench.task.objective(Tools(self.model, self.recipe.training, self._bench.tokenizer, inside, key))

    def loss(self, tensors: Tensors, rows: int | None = None, *, alone: bool = False) -> float:
        """The task's mean loss over the silo's training rows, or a keyed subset of them, with these values; `alone`:
        each row in a forward pass of its own."""
        from fedlm.training.forward import sequence_nll
        from fedlm.training.objective import mean_loss, sequences_of

        if self._private is not None:
            raise TrainingError("a loss over rows has no noise, and this run's training is private")
        self.put(tensors)
        chosen = list(range(len(self.tokens)))
        if rows is not None and rows < len(chosen):
            generator = numpy_generator(self.recipe.seed, "loss rows", self.place.silo)
            chosen = sorted(generator.permutation(len(chosen))[:rows].tolist())
        examples, limit = [self.tokens[i] for i in chosen], 1 if alone else self.recipe.evaluation.batch_tokens
        if not TASKS[self.recipe.task].likelihood:
            return mean_loss(self.objective("loss"), examples, limit)
        sums, counts = sequence_nll(self.model, sequences_of(examples), limit, packing=self.recipe.training.packing)
        return float(sums.sum() / counts.sum())

    def should_stop(self) -> bool:
        return self._should_stop()

    def observe(self, event: Event) -> None:
        if self._observe is not None:
            self._observe({"silo": self.place.silo, "round": self.place.round, **event})
