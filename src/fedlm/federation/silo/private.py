"""A silo's own differential privacy, `privacy.unit: example` or `user`: the noise of its training, and what that has
cost.

The silo calibrates the noise to the recipe's budget for its own number of units, rows or users, which is public
(neighbours differ in what one unit contributes, Kairouz et al. 2021, definition 1.1). Each round's cost is in its
ledger, `<root>/<silo>/<run>/ledger.jsonl`, before the update leaves; a round that would exceed the budget does not
leave.
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
from fedlm.federation.silo.secret import secret_of
from fedlm.federation.silo.state import tensors_digest
from fedlm.messages import Request, Tensors
from fedlm.privacy.accounting import spent
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.ledger import Budget, Event, Ledger
from fedlm.privacy.mechanisms import Gaussian, Poisson, times
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
    """What rounds of DP-SGD over so many units cost; all of it is public.

    Args:
        mechanism: of one round: its steps, each over a Poisson sample of the units.
        expected: units in a step.
        budget: of the whole run.
    """

    mechanism: Gaussian
    expected: float
    budget: Budget

    def epsilon(self, rounds: int) -> float:
        """Spent by so many rounds."""
        whole = [times(self.mechanism, self.mechanism.count * rounds)] if rounds else []
        return spent(whole, self.budget.delta).epsilon


def cost(recipe: Recipe, silo: str, units: int) -> Cost:
    """The least noise with which all rounds of the recipe keep its budget.

    Args:
        units: the silo's rows, or its users.

    Raises:
        PrivacyError: delta is not below 1/units, or no noise keeps the budget.
    """
    spec, training = recipe.privacy, recipe.training
    assert spec is not None and training.steps is not None  # the recipe was checked
    expected = min(training.batch_size, units)
    noise = _noise(expected / units, training.steps * recipe.federation.rounds, spec.epsilon, spec.delta, units)
    mechanism = Gaussian(spec.unit, "zero-out", noise, Poisson(expected / units, secret=True), training.steps)
    return Cost(mechanism, expected, Budget(spec.unit, "zero-out", spec.epsilon, spec.delta, {silo: units}))


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
        secret = secret_of(self._folder, None if not self._simulated else (self._recipe.seed, self._request.silo))
        run = "" if self._simulated else self._request.run  # its name is another in every simulation of one recipe
        place = (run, self._request.round, self._request.silo, self._digest)
        draws = SecretStream(secret, "draws", *place)
        picks = SecretStream(secret, "picks", *place)
        noise = SecretStream(secret, "noise", *place)

        def normal(shape: torch.Size, deviation: float) -> Tensor:
            return torch.from_numpy(gaussian(noise, deviation, shape.numel()).astype(np.float32)).view(shape)

        return partial(
            train_private,
            mechanism=self._mechanism(units_of(self._recipe, tokens)),
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
            PrivacyError: the ledger is damaged or open elsewhere.
        """
        mine, request = cost(self._recipe, self._request.silo, units), self._request
        folder = self._folder / request.run
        with disk_errors(folder, "silo's ledger"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with Ledger(folder / LEDGER, mine.budget) as ledger:
                ledger.charge(
                    # The same bytes cost nothing more in another attempt, and other bytes are another event anyway.
                    Event(request.run, request.round, 0, request.silo, mine.mechanism, tensors_digest(update))
                )

    def _mechanism(self, units: int) -> Mechanism:
        from fedlm.training.private.loop import Mechanism

        spec, mine = self._recipe.privacy, cost(self._recipe, self._request.silo, units)
        assert spec is not None and isinstance(mine.mechanism.sampling, Poisson)
        assert mine.mechanism.noise_multiplier is not None
        return Mechanism(
            clip=spec.clip,
            noise=mine.mechanism.noise_multiplier,
            rate=mine.mechanism.sampling.rate,
            expected=mine.expected,
            steps=mine.mechanism.count,
            user_examples=spec.user_examples if by_user(self._recipe) else None,
        )
