"""A silo's own differential privacy, `privacy.unit: example` or `user`: the noise of its training, and what that has
cost.

The silo calibrates the noise to the recipe's budget for its own number of units, rows or users, which is public
(neighbours differ in what one unit contributes, Kairouz et al. 2021, definition 1.1). Each round's cost is in its
ledger, `<root>/<silo>/<run>/ledger.jsonl`, before the update leaves; a round that would exceed the budget does not
leave. With `mechanism: dp-ftrl` all steps of the run are one release, charged in full before the first update leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import TrainingError
from fedlm.federation.disk import disk_errors
from fedlm.federation.silo import cycled
from fedlm.federation.silo.secret import secret_of
from fedlm.federation.silo.state import tensors_digest
from fedlm.messages import Request, Tensors
from fedlm.privacy.accounting import spent
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.chain import Chain
from fedlm.privacy.cycle import CorrelatedNoise, Cycle, plan
from fedlm.privacy.ledger import Budget, Event, Ledger
from fedlm.privacy.mechanisms import Gaussian, Poisson, describe, times
from fedlm.privacy.noise import gaussian
from fedlm.privacy.stream import SecretStream
from fedlm.recipe.privacy import by_user
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.training.encode import TokenSet
    from fedlm.training.private.loop import Mechanism, PrivateTrainer

LEDGER = "ledger.jsonl"


@dataclass(frozen=True)
class Cost:
    """What rounds of DP-SGD, or a run of DP-FTRL, over so many units cost; all of it is public.

    Args:
        mechanism: of one round: its steps, each over a Poisson sample of the units; with a cycle, of the whole run.
        expected: units in a step.
        budget: of the whole run.
        cycle: of DP-FTRL.
    """

    mechanism: Gaussian
    expected: float
    budget: Budget
    cycle: Cycle | None = None

    def epsilon(self, rounds: int) -> float:
        """Spent by so many rounds."""
        each = 1 if self.cycle is not None else rounds
        whole = [times(self.mechanism, self.mechanism.count * each)] if rounds else []
        return spent(whole, self.budget.delta).epsilon

    def words(self) -> str:
        """The noise, in a few words."""
        if self.cycle is None:
            return f"{describe(self.mechanism)} a round"
        return (
            f"{describe(self.mechanism)} for the whole run: each is in every {self.cycle.batches}th of "
            f"{self.cycle.steps} steps, whose noise is correlated over {self.cycle.bands}"
        )


def cost(recipe: Recipe, silo: str, units: int) -> Cost:
    """The least noise with which all rounds of the recipe keep its budget.

    Args:
        units: the silo's rows, or its users.

    Raises:
        PrivacyError: delta is not below 1/units, or no noise keeps the budget.
    """
    spec, training = recipe.privacy, recipe.training
    assert spec is not None and training.steps is not None  # the recipe was checked
    budget = Budget(spec.unit, "zero-out", spec.epsilon, spec.delta, {silo: units})
    if spec.mechanism == "dp-ftrl":
        steps = training.steps * recipe.federation.rounds
        cycle = plan(spec.unit, units, training.batch_size, steps, spec.epsilon, spec.delta, spec.bands)
        return Cost(cycle.mechanism, cycle.expected, budget, cycle)
    expected = min(training.batch_size, units)
    noise = _noise(expected / units, training.steps * recipe.federation.rounds, spec.epsilon, spec.delta, units)
    mechanism = Gaussian(spec.unit, "zero-out", noise, Poisson(expected / units, secret=True), training.steps)
    return Cost(mechanism, expected, budget)


@lru_cache(maxsize=256)
def _noise(rate: float, steps: int, epsilon: float, delta: float, units: int) -> float | None:
    asked = Gaussian("example", "zero-out", None, Poisson(rate, secret=True), steps)  # whatever a unit is
    return calibrate(asked, epsilon, delta, units).noise_multiplier


def units_of(recipe: Recipe, tokens: TokenSet) -> int:
    """How many units a silo's examples are of: examples, or users.

    Raises:
        TrainingError: users are protected, and the examples do not say whose they are.
    """
    if not by_user(recipe):
        return len(tokens)
    if tokens.users is None:
        raise TrainingError("users are to be protected, and the silo's examples do not say whose they are")
    return len(np.unique(tokens.users))


class PrivateRound:
    """One round of private training: its mechanism, its secret draws, and its line in the ledger.

    Args:
        folder: the silo's private folder.
        digest: of the request: what is drawn for one content is never drawn for another.
        simulated: a test key in place of a secret one, so that simulations give the same bits.
    """

    def __init__(self, recipe: Recipe, request: Request, folder: Path, digest: str, *, simulated: bool) -> None:
        self._recipe, self._request, self._folder, self._digest = recipe, request, folder, digest
        self._simulated, self._begun = simulated, False

    @property
    def _run(self) -> str:
        """Names the run in what draws are keyed by: its own name is another in every simulation of one recipe."""
        return "" if self._simulated else self._request.run

    def _secret(self) -> bytes:
        return secret_of(self._folder, (self._recipe.seed, self._request.silo) if self._simulated else None)

    def trainer(self, tokens: TokenSet) -> PrivateTrainer:
        """Trains once, over these examples.

        Raises:
            TrainingError: a second time in this round, or examples do not say whose they are and should.
            PrivacyError: the recipe's budget is none for so many units.
        """
        from fedlm.training.private.loop import train_private

        if self._begun:
            raise TrainingError("private training is accounted for once in a round, and this method trains twice")
        self._begun = True
        secret, run = self._secret(), self._run
        place = (run, self._request.round, self._request.silo, self._digest)
        draws = SecretStream(secret, "draws", *place)
        picks = SecretStream(secret, "picks", *place)
        noise = SecretStream(secret, "noise", *place)
        mine, correlated = cost(self._recipe, self._request.silo, units_of(self._recipe, tokens)), None
        if mine.cycle is not None:  # the same in every round, whatever is asked
            whole = (run, self._request.silo, cycled.plan_hash(mine.cycle))
            draws = SecretStream(secret, "order", *whole)
            steps = self._recipe.training.steps
            assert steps is not None
            correlated = CorrelatedNoise(mine.cycle, secret, whole, self._request.round * steps)

        def normal(name: str, shape: torch.Size, deviation: float) -> Tensor:
            if correlated is None:
                found = gaussian(noise, deviation, shape.numel())
            else:
                found = deviation * correlated(name, shape.numel())
            return torch.from_numpy(found.astype(np.float32)).view(shape)

        return partial(
            train_private,
            mechanism=self._mechanism(mine),
            draws=np.random.Generator(np.random.Philox(key=draws.words(2))),
            picks=np.random.Generator(np.random.Philox(key=picks.words(2))),
            noise=normal,
        )

    def charge(self, update: Tensors, units: int) -> None:
        """Write the round's cost down; the update may leave afterwards. The same update is charged once.

        Args:
            units: that it was made of.

        Raises:
            BudgetExceeded: the budget would be exceeded.
            PrivacyError: the ledger is damaged or open elsewhere; or the noise of this round is used up.
        """
        mine, request = cost(self._recipe, self._request.silo, units), self._request
        folder = self._folder / request.run
        with disk_errors(folder, "silo's ledger"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if mine.cycle is not None:
                self._charge_once(folder, mine, mine.cycle, tensors_digest(update))
                return
            with Ledger(folder / LEDGER, mine.budget) as ledger:
                ledger.charge(
                    # The same bytes cost nothing more in another attempt, and other bytes are another event anyway.
                    Event(request.run, request.round, 0, request.silo, mine.mechanism, tensors_digest(update))
                )

    def _charge_once(self, folder: Path, mine: Cost, cycle: Cycle, content: str) -> None:
        """Pay for the whole run, once, and hold each round to one content. Whatever stops it in between, what has left
        is paid for and known."""
        request = self._request
        key = "".join(f"{word:016x}" for word in SecretStream(self._secret(), "key", self._run, request.silo).words(2))
        with Chain(folder / cycled.FILE) as chain:
            cycled.begin(chain, cycle, key, charged=(folder / LEDGER).exists())
            new = cycled.is_new(chain, request.round, content)
            with Ledger(folder / LEDGER, mine.budget) as ledger:
                ledger.charge(Event(request.run, 0, 0, request.silo, mine.mechanism, cycled.plan_hash(cycle)))
            if new:
                cycled.note(chain, request.round, content)

    def _mechanism(self, mine: Cost) -> Mechanism:
        from fedlm.training.private.loop import Mechanism

        spec, steps, noise = self._recipe.privacy, self._recipe.training.steps, mine.mechanism.noise_multiplier
        assert spec is not None and steps is not None and noise is not None
        return Mechanism(
            clip=spec.clip,
            noise=noise if mine.cycle is None else mine.cycle.deviation,
            rate=mine.mechanism.sampling.rate if isinstance(mine.mechanism.sampling, Poisson) else 1.0,
            expected=mine.expected,
            steps=steps,
            user_examples=spec.user_examples if by_user(self._recipe) else None,
            cycle=None if mine.cycle is None else mine.cycle.batches,
        )
