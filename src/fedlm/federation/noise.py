"""Differential privacy of whole silos, `privacy.unit: silo`: noise on the sum of clipped updates, at the coordinator.

theta <- theta + (sum_i clip(u_i, C) + N(0, sigma^2 C^2)) / m (McMahan, Ramage, Talwar, Zhang, ICLR 2018), all silos
counting alike; what follows from the noised sum costs nothing more, so that the server's step may be any. Everyone who
sees the models is kept from telling what one silo contributed; the coordinator itself sees each update and must be
trusted with it.

A silo's contribution is set to zero in a neighbouring federation, and how many there are is public (Kairouz et al.,
2021, definition 1.1). A sample of silos is drawn from the run's seed, which others know: it makes nothing cheaper.

What was noised is on disk before it is charged, and charged before it is used: a resumed run goes on with the same
noise, so that nobody sees one sum under two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fedlm.algorithms.base import Accumulator
from fedlm.errors import RunError, UpdateRefused
from fedlm.federation.disk import disk_errors
from fedlm.federation.rundir import RunDir
from fedlm.federation.silo.private import LEDGER
from fedlm.federation.silo.secret import secret_of
from fedlm.federation.silo.state import tensors_digest
from fedlm.files import read_tensors, sha256_file, write_tensors
from fedlm.messages import Fields, Tensors
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.clipping import l2_norm
from fedlm.privacy.ledger import Budget, Event, Ledger
from fedlm.privacy.mechanisms import Gaussian
from fedlm.privacy.noise import gaussian
from fedlm.privacy.stream import SecretStream
from fedlm.recipe.schema import Recipe

PARTY = "the coordinator"

MODEL = "sha256 of the model before"
"""Beside the noised sum in its file."""

SLACK = 1 + 1e-9
"""Of norms, which both sides take in fp64 and perhaps in another order of sums."""


def mechanism_of(recipe: Recipe, silos: int) -> Gaussian:
    """Of a round: the least noise with which all rounds of the recipe keep its budget.

    Raises:
        PrivacyError: delta is not below 1/silos, or no noise keeps the budget.
    """
    spec = recipe.privacy
    assert spec is not None
    whole = Gaussian("silo", "zero-out", None, count=recipe.federation.rounds)
    return replace(calibrate(whole, spec.epsilon, spec.delta, silos), count=1)


class SumNoise:
    """One run's.

    Args:
        silos: everyone who may take part.

    Raises:
        PrivacyError: delta is not below 1/silos, or no noise keeps the budget.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, silos: list[str]) -> None:
        spec = recipe.privacy
        assert spec is not None
        self._recipe, self._dir, self.clip = recipe, run_dir, spec.clip
        self._budget = Budget("silo", "zero-out", spec.epsilon, spec.delta, dict.fromkeys(silos, 1))
        self.mechanism = mechanism_of(recipe, len(silos))

    def check(self, silo: str, update: Mapping[str, torch.Tensor]) -> None:
        """Raises UpdateRefused: an update is larger than noise hides."""
        norm = l2_norm(dict(update))
        if norm > self.clip * SLACK:
            raise UpdateRefused(f"the update's norm is {norm:.6g}, above the clip of {self.clip:g}", where=silo)

    def add(self, accumulator: Accumulator, number: int, model: Tensors) -> Fields:
        """Noise the sum in place, once it is paid for; figures of what that cost.

        Args:
            model: that the round began with.

        Raises:
            BudgetExceeded: the run's budget would be exceeded; nothing was used.
            RunError: the disk is full, or no update was accepted.
        """
        if not accumulator.count or accumulator.lacking:
            raise RunError("no whole update was accepted, so there is no sum to add noise to")
        file = self._dir.path / "noised" / f"round-{number:04d}.safetensors"
        before = tensors_digest(model)
        with disk_errors(self._dir.path):
            kept = self._kept(file, before)
            if kept is None:
                file.parent.mkdir(mode=0o700, exist_ok=True)
                kept = self._noised(accumulator, number, before)
                write_tensors(file, kept)
                for old in file.parent.glob("round-*.safetensors"):
                    if old != file:
                        old.unlink()
            with Ledger(self._dir.path / LEDGER, self._budget) as ledger:
                attempt = int(self._dir.meta.get("restarts", 0))
                ledger.charge(Event(self._dir.run, number, attempt, None, self.mechanism, sha256_file(file)))
                spent = ledger.spent().epsilon
        for name, total in accumulator.total.items():
            total.copy_(kept[name])
        return {"epsilon": spent}

    def _kept(self, file: Path, before: str) -> Tensors | None:
        """The round's sum as it was noised before this process was killed, unless it began with another model."""
        if not file.exists():
            return None
        found = read_tensors(file)
        mark = bytes(found.pop(MODEL).tolist()).hex()
        return found if mark == before else None

    def _noised(self, accumulator: Accumulator, number: int, before: str) -> Tensors:
        network = bool(self._dir.meta.get("network"))
        secret = secret_of(self._dir.path / "noised", None if network else (self._recipe.seed, PARTY))
        run = self._dir.run if network else ""  # its name is another in every simulation of one recipe
        stream = SecretStream(secret, "noise", run, number, before, tensors_digest(accumulator.total))
        assert self.mechanism.noise_multiplier is not None
        deviation = self.mechanism.noise_multiplier * self.clip * SLACK
        noised: Tensors = {}
        for name, total in accumulator.total.items():
            drawn = torch.from_numpy(gaussian(stream, deviation, total.numel())).view(total.shape)
            noised[name] = (total.to(torch.float64) + drawn).to(torch.float32)
        noised[MODEL] = torch.tensor(list(bytes.fromhex(before)), dtype=torch.uint8)
        return noised
