"""Differential privacy of whole silos, `privacy.unit: silo`: noise on the sum of clipped updates, at the coordinator.

theta <- theta + (sum_i clip(u_i, C) + N(0, sigma^2 C^2)) / m (McMahan, Ramage, Talwar, Zhang, ICLR 2018), all silos
counting alike; what follows from the noised sum costs nothing more, so that the server's step may be any. Everyone who
sees the models is kept from telling what one silo contributed; the coordinator itself sees each update and must be
trusted with it.

With `privacy.adaptive` the clip C follows a quantile of the updates' norms (Andrew et al., NeurIPS 2021): each silo
tells whether its update was within it, and sum and count together, with noise z_delta and sigma_b, cost what the sum
alone would with the budget's noise multiplier z = (z_delta^-2 + (2 sigma_b)^-2)^(-1/2).

A silo's contribution is set to zero in a neighbouring federation, and how many there are is public (Kairouz et al.,
2021, definition 1.1). A sample of silos is drawn from the run's seed, which others know: it makes nothing cheaper.

What was noised is on disk before it is charged, and charged before it is used: a resumed run goes on with the same
noise, so that nobody sees one sum under two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fedlm.algorithms.base import Accumulator
from fedlm.errors import RunError, UpdateRefused
from fedlm.federation.disk import disk_errors
from fedlm.federation.rundir import RunDir
from fedlm.federation.sampling import wanted
from fedlm.federation.silo.private import LEDGER
from fedlm.federation.silo.secret import secret_of
from fedlm.federation.silo.state import tensors_digest
from fedlm.federation.silo.trained import CLIP, WITHIN
from fedlm.files import read_tensors, sha256_file, write_tensors
from fedlm.messages import Fields, Tensors
from fedlm.privacy.adaptive_clipping import AdaptiveClipping, default_count_noise
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

COUNT = "noised count within the clip"
"""The same, with an adaptive clip."""

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


def adaptive_of(recipe: Recipe, silos: int) -> AdaptiveClipping | None:
    """How the clip moves, of so many silos that may take part; None where it does not.

    Raises:
        PrivacyError: as `mechanism_of`.
    """
    spec = recipe.privacy.adaptive if recipe.privacy is not None else None
    if spec is None:
        return None
    noise = mechanism_of(recipe, silos).noise_multiplier
    assert noise is not None
    count_noise = spec.count_noise or default_count_noise(noise, wanted(recipe.federation, silos))
    return AdaptiveClipping(count_noise, spec.quantile, spec.rate)


class SumNoise:
    """One run's.

    Args:
        silos: everyone who may take part.

    Attributes:
        clip: of the round under way.
        mechanism: of a round, all that leaves it together.

    Raises:
        PrivacyError: delta is not below 1/silos, or no noise keeps the budget.
    """

    def __init__(self, recipe: Recipe, run_dir: RunDir, silos: list[str]) -> None:
        spec = recipe.privacy
        assert spec is not None
        self._recipe, self._dir, self.clip = recipe, run_dir, spec.clip
        self._budget = Budget("silo", "zero-out", spec.epsilon, spec.delta, dict.fromkeys(silos, 1))
        self.mechanism = mechanism_of(recipe, len(silos))
        assert self.mechanism.noise_multiplier is not None
        self.adaptive = adaptive_of(recipe, len(silos))
        noise = self.mechanism.noise_multiplier
        self._sum_noise = noise if self.adaptive is None else self.adaptive.update_noise(noise)

    @property
    def asked(self) -> Fields:
        """What a silo is told of the round's clip."""
        return {} if self.adaptive is None else {CLIP: self.clip}

    def check(self, silo: str, update: Mapping[str, torch.Tensor], fields: Fields) -> None:
        """Raises UpdateRefused: an update is larger than noise hides, or does not say whether it was clipped."""
        norm = l2_norm(dict(update))
        if norm > self.clip * SLACK:
            raise UpdateRefused(f"the update's norm is {norm:.6g}, above the clip of {self.clip:g}", where=silo)
        if self.adaptive is not None and not isinstance(fields.get(WITHIN), bool):
            raise UpdateRefused("the reply does not say whether the update was within the clip", where=silo)

    def add(self, accumulator: Accumulator, number: int, model: Tensors, replies: Iterable[Fields] = ()) -> Fields:
        """Noise the sum in place, once it is paid for, and move the clip; figures of the round.

        Args:
            model: that the round began with.
            replies: what silos said beside the updates in the sum.

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
                kept = self._noised(accumulator, number, before, [bool(said.get(WITHIN)) for said in replies])
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
        figures: Fields = {"epsilon": spent}
        if self.adaptive is not None:  # from the noised count, which costs nothing more
            share = float(kept[COUNT]) / accumulator.count + 0.5
            figures |= {CLIP: self.clip, "within_clip": share}
            self.clip = self.adaptive.step(self.clip, float(kept[COUNT]), accumulator.count)
        return figures

    def _kept(self, file: Path, before: str) -> Tensors | None:
        """The round's sum as it was noised before this process was killed, unless it began with another model."""
        if not file.exists():
            return None
        found = read_tensors(file)
        mark = bytes(found.pop(MODEL).tolist()).hex()
        return found if mark == before else None

    def _noised(self, accumulator: Accumulator, number: int, before: str, within: list[bool]) -> Tensors:
        network = bool(self._dir.meta.get("network"))
        secret = secret_of(self._dir.path / "noised", None if network else (self._recipe.seed, PARTY))
        run = self._dir.run if network else ""  # its name is another in every simulation of one recipe
        stream = SecretStream(secret, "noise", run, number, before, tensors_digest(accumulator.total))
        deviation = self._sum_noise * self.clip * SLACK
        noised: Tensors = {}
        for name, total in accumulator.total.items():
            drawn = torch.from_numpy(gaussian(stream, deviation, total.numel())).view(total.shape)
            noised[name] = (total.to(torch.float64) + drawn).to(torch.float32)
        if self.adaptive is not None:
            assert len(within) == accumulator.count
            count = math.fsum(map(self.adaptive.indicator, within))
            noised[COUNT] = torch.from_numpy(count + gaussian(stream, self.adaptive.count_noise, 1))
        noised[MODEL] = torch.tensor(list(bytes.fromhex(before)), dtype=torch.uint8)
        return noised
