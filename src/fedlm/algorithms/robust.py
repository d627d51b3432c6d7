"""What rules against bad silos share: updates wait, are counted, compared in one of two spaces, and combined.

Such a rule supposes that most silos are honest and learn alike. It bounds what a minority can do to a round's step; it
does not make a bad silo good, and honest silos whose text differs from the others' may be left out with the bad ones.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedlm.algorithms.base import Accumulator, Algorithm, Place, Step
from fedlm.algorithms.gathered import Gathered, Grouped
from fedlm.algorithms.lora import grown
from fedlm.algorithms.pairwise import Vector
from fedlm.algorithms.spaces import Factors, Products, space_of
from fedlm.errors import RunError
from fedlm.messages import Fields, Tensors
from fedlm.models.deltas import is_delta, pieces_of
from fedlm.recipe.methods import ALGORITHMS


class Robust(Algorithm):
    """A rule against bad silos. Rules differ in `step`."""

    def accumulator(self, spool: Path) -> Accumulator:
        grouped = self.spec.groups is not None and "groups" in ALGORITHMS[self.spec.name].options
        return Grouped(spool, self.spec.groups or 0) if grouped else Gathered(spool)

    def asked(self, accumulator: Accumulator, silos: Sequence[str], place: Place) -> None:
        assert isinstance(accumulator, Gathered)
        accumulator.deal(silos, place)
        if isinstance(accumulator, Grouped):
            self._enough(min(self.spec.groups or 0, len(silos)), "groups can be made of the silos asked")
        else:
            self._enough(len(silos), "silos are asked")

    def expected_update(self, parameters: Tensors, place: Place) -> dict[str, torch.Size]:
        return {name: value.shape for name, value in parameters.items() if not is_delta(name)}

    def fold(self, accumulator: Accumulator, update: Mapping[str, Tensor], weight: float, place: Place) -> None:
        assert isinstance(accumulator, Gathered)
        accumulator.keep(update, weight, place)

    def server_step(
        self, parameters: Tensors, accumulator: Accumulator, state: Tensors, step: Step
    ) -> tuple[Tensors, Tensors]:
        """Raises:
        RunError: fewer updates than the rule needs to withstand `byzantine` bad silos.
        """
        assert isinstance(accumulator, Gathered)
        accumulator.complete()
        self.require(accumulator)
        return self.step(space_of(self, parameters, accumulator, step.round), accumulator, state)

    def require(self, gathered: Gathered) -> None:
        """Raises RunError where fewer updates, or means of groups, came than the rule needs."""
        self._enough(len(gathered.kept), "groups answered" if isinstance(gathered, Grouped) else "silos answered")

    def _enough(self, count: int, what: str) -> None:
        needed, f = self.spec.updates_needed(), self.spec.byzantine
        if count < needed:
            raise RunError(
                f"'{self.spec.name}' withstands {f} bad silos among at least {needed}, and {count} {what}",
                fix="mend the silos and continue with --resume, or take a lower federation.algorithm.byzantine in a "
                "new run",
            )

    @abstractmethod
    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        """The next global model and server state, from the updates in `gathered.kept`."""

    def measure(
        self, before: tuple[Tensors, Tensors], accumulator: Accumulator, after: tuple[Tensors, Tensors], round_: int
    ) -> Fields:
        """What the rule did: `coefficients` of silos (or groups) in the step, `chosen` ones, `groups` and who is in
        them. With `robust_on: product`, `deltas` says how far what is merged has grown."""
        assert isinstance(accumulator, Gathered)
        pieces = pieces_of(after[0])
        return accumulator.figures | ({"deltas": grown(pieces)} if pieces else {})


class Combining(Robust):
    """A rule whose step is sum_i c_i u_i. Rules differ in `coefficients`."""

    def step(self, space: Factors | Products, gathered: Gathered, state: Tensors) -> tuple[Tensors, Tensors]:
        c = self.coefficients(space, gathered)
        tell(gathered, c)
        return space.moved(c), state

    @abstractmethod
    def coefficients(self, space: Factors | Products, gathered: Gathered) -> Vector:
        """c [n]."""


def tell(gathered: Gathered, c: Vector) -> None:
    """Write down what each silo or group counted for."""
    gathered.figures["coefficients"] = {kept.place.silo: float(x) for kept, x in zip(gathered.kept, c, strict=True)}
