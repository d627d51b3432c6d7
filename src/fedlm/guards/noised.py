"""What lies under a mask when silos are protected: clipped values on a grid, with whole-number noise of the silo's own.

Nobody sees the sum without noise. Each silo adds as much as the fewest silos need that are in the sum and keep theirs
to themselves (Kairouz, Liu, Steinke, ICML 2021, and Agarwal, Kairouz, Liu, NeurIPS 2021; bounds in
`fedlm.privacy.distributed`). Sums are modulo 2^ring_bits; a sum that wrapped around would be wrong and no less private,
and the grid leaves it ten standard deviations of room.

With `privacy.adaptive` the clip C moves from round to round. Bound and noise are counts of the grid's steps, so another
clip is another length of a step, and the guarantee does not depend on it. Whether the update was within the clip, b =
+1/2 or -1/2, is one number more of the same vector (Andrew, Thakkar, McMahan, Ramaswamy, NeurIPS 2021, algorithm 1,
with its two Gaussians as one of d + 1 numbers): with c the vector's bound and z the noise multiplier of the budget,

    (u / step, b c z / sigma_b),  step = C z_delta / (c z),  z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2),

whose norm is at most c, since (z / z_delta)^2 + (z / (2 sigma_b))^2 = 1. Noise of z c on each number is noise of
z_delta C on the updates' sum and of sigma_b on the count: theorem 1 of the paper, at the discrete mechanism's z.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedlm.errors import PrivacyError, RunError
from fedlm.messages import Fields
from fedlm.privacy.adaptive_clipping import AdaptiveClipping, default_count_noise
from fedlm.privacy.calibration import calibrate
from fedlm.privacy.mechanisms import DistributedNoise, Noise, noise_multiplier
from fedlm.privacy.noise import LARGEST_SCALE, discrete_gaussian, skellam
from fedlm.privacy.rounding import conditional_round
from fedlm.privacy.secagg.message import Words
from fedlm.privacy.stream import SecretStream
from fedlm.recipe.guards import mask_of
from fedlm.recipe.schema import Recipe

ROOM = 10
"""Standard deviations of the noise that a sum may be off before it wraps around."""


SMALLEST_STEP = sys.float_info.min
"""Of a grid: below it quotients are no longer exact."""


@dataclass(frozen=True)
class NoisedEncoding:
    """How clipped values become ring elements; public.

    Attributes:
        mechanism: of one round; its bound is in steps of the grid.
        step: of the grid.
        ring_bits: sums are modulo 2^ring_bits.
        adaptive: how the clip moves, where it does; its noise on the count is that of `mechanism.survivors` silos.
        clip: of the round, where it moves.
    """

    mechanism: DistributedNoise
    step: float
    ring_bits: int
    adaptive: AdaptiveClipping | None = None
    clip: float | None = None

    @property
    def one(self) -> float:
        """Of the count of updates within the clip, in steps of the grid.

        Raises:
            PrivacyError: nothing is counted.
        """
        if self.adaptive is None:
            raise PrivacyError("this run's clip does not move, and no update within it is counted")
        return self.mechanism.bound * noise_multiplier(self.mechanism) / self.adaptive.count_noise

    @property
    def fields(self) -> Fields:
        """As plain JSON, for `Parameters.agreed`."""
        fields: Fields = {
            "noise": self.mechanism.noise,
            "noise_multiplier": self.mechanism.noise_multiplier,
            "bound": self.mechanism.bound,
            "survivors": self.mechanism.survivors,
            "step": self.step,
        }
        return fields if self.adaptive is None else {**fields, "clip": self.clip, "count": self.one}


def least_survivors(recipe: Recipe, silos: int) -> int:
    """Silos that must be in a sum of so many, so that its noise is enough: all but those that may drop out."""
    spec = mask_of(recipe)
    assert spec is not None
    return silos - math.ceil(spec.dropouts * silos - 1e-9)


def noised_encoding(recipe: Recipe, silos: int, values: int, clip: float | None = None) -> NoisedEncoding:
    """For a round of so many silos with so many values each.

    Args:
        clip: of the round, above 0 and finite, where it moves (`privacy.adaptive`).

    Raises:
        PrivacyError: no noise keeps the recipe's budget, or the count within the clip spends all of it.
        RunError: nobody's noise is left after dropouts and collusion, or the ring is too small.
    """
    spec, mask = recipe.privacy, mask_of(recipe)
    assert spec is not None and mask is not None
    honest = least_survivors(recipe, silos) - math.ceil(mask.corrupt * silos - 1e-9)
    if honest < 1:
        raise RunError(
            f"of {silos} silos none is sure to be there and to keep its noise to itself",
            where="guards",
            fix="have more silos, or assume fewer `dropouts` or `corrupt` ones",
        )
    ring_bits = max(2, mask.bits + (silos - 1).bit_length())
    if ring_bits > 32:
        raise RunError(f"{silos} silos and {mask.bits} bits a value take {ring_bits} bits, and there are 32")
    rounds, moves = recipe.federation.rounds, spec.adaptive
    numbers = values + (moves is not None)
    mechanism = _mechanism(spec.noise, spec.epsilon, spec.delta, rounds, silos, honest, numbers, ring_bits)
    if moves is None:
        return NoisedEncoding(mechanism, spec.clip / mechanism.bound, ring_bits)
    if clip is None:
        raise PrivacyError("this run's clip moves from round to round, and it is not said where it is")
    noise = noise_multiplier(mechanism)
    adaptive = AdaptiveClipping(moves.count_noise or default_count_noise(noise, silos), moves.quantile, moves.rate)
    step = clip * adaptive.update_noise(noise) / (noise * mechanism.bound)
    if not SMALLEST_STEP <= step < math.inf:
        raise PrivacyError(f"a clip of {clip} gives steps of {step}, with which nothing can be counted")
    return NoisedEncoding(mechanism, step, ring_bits, adaptive, clip)


@lru_cache(maxsize=64)
def _mechanism(
    noise: Noise, epsilon: float, delta: float, rounds: int, silos: int, honest: int, numbers: int, ring_bits: int
) -> DistributedNoise:
    """Of a round, on the finest grid whose sums have room."""
    half = float(2 ** (ring_bits - 1) - 1)
    bound = half / (2 * silos)
    for _ in range(60):
        asked = DistributedNoise("silo", "zero-out", noise, None, bound, numbers, honest, count=rounds)
        found = calibrate(asked, epsilon, delta, silos)
        all_noise = noise_multiplier(found) * bound * math.sqrt(silos / honest)
        if silos * (bound + 1) + ROOM * all_noise <= half and found.silo_scale() <= LARGEST_SCALE:
            return replace(found, count=1)
        bound = min(0.98 * bound, half / (silos + ROOM * all_noise / bound))
        if bound < 1:
            break
    raise RunError(
        f"a ring of {ring_bits} bits has no room for the noise of epsilon {epsilon:g} over {rounds} rounds",
        where="guards",
        fix="give the mask more `bits`, or ask for less",
    )


def hidden_noised(values: Tensor, how: NoisedEncoding, stream: SecretStream, within: bool | None = None) -> Words:
    """A silo's ring elements, uint32 [n + 2]: noised values; where the loss would be 0, or what the silo adds to the
    count, noised; and its weight, 1.

    Args:
        values: fp32 [n], of a norm within the clip.
        stream: nobody else may know its words, nor are they drawn again for other values.
        within: whether the update was within the clip as it was, where the clip moves.

    Raises:
        PrivacyError: the values are not finite, their norm is beyond the clip, they are not as many as the noise is
            for, or it is not known whether the update was within the clip.
    """
    mechanism = how.mechanism
    scaled = values.numpy().astype(np.float64) / how.step
    if how.adaptive is not None:
        if not isinstance(within, bool):
            raise PrivacyError("it is not known whether the update was within the clip, and the noise is for that too")
        scaled = np.append(scaled, how.adaptive.indicator(within) * how.one)
    if scaled.size != mechanism.dimension:
        raise PrivacyError(f"there are {scaled.size} numbers, and the noise is for {mechanism.dimension}")
    whole = conditional_round(scaled, mechanism.bound, mechanism.retry, stream)
    scale = mechanism.silo_scale()
    if mechanism.noise == "skellam":
        whole += skellam(stream, scale**2, whole.size)
    else:
        whole += discrete_gaussian(stream, scale, whole.size)
    beside = [1] if how.adaptive is not None else [0, 1]
    ring: Words = (np.append(whole, beside) & (2**how.ring_bits - 1)).astype(np.uint32)  # two's complement: modulo
    return ring


def shown_noised(total: Words, silos: int, how: NoisedEncoding) -> tuple[Tensor, int]:
    """The means of values with noise, fp32 [n], and the weights' sum.

    Raises:
        RunError: no silos' elements have this sum.
    """
    if int(total[-1]) != silos:
        raise RunError(f"the aggregate is out of range: the weights' sum is {int(total[-1])}, of {silos} silos")
    return torch.from_numpy((_signed(total[:-2], how) * (how.step / silos)).astype(np.float32)), silos


def shown_count(total: Words, silos: int, how: NoisedEncoding) -> float:
    """Of silos in a sum, those whose update was within the clip less those whose was not, halved, with noise.

    Raises:
        PrivacyError: nothing is counted.
        RunError: no silos' elements have this sum.
    """
    count = float(_signed(total[-2:-1], how)[0] / how.one)
    noise = how.mechanism.silo_scale() * math.sqrt(silos) / how.one
    if abs(count) > silos * (0.5 + 1 / how.one) + ROOM * noise:
        raise RunError(f"the aggregate is out of range: {count:.4g} is no count of {silos} silos and noise {noise:.4g}")
    return count


def _signed(elements: Words, how: NoisedEncoding) -> NDArray[np.int64]:
    """The ring's upper half is negative."""
    signed = elements.astype(np.int64)
    signed[signed >= 2 ** (how.ring_bits - 1)] -= 2**how.ring_bits
    return signed
