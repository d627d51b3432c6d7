"""What lies under a mask when silos are protected: clipped values on a grid, with whole-number noise of the silo's own.

Nobody sees the sum without noise. Each silo adds as much as the fewest silos need that are in the sum and keep theirs
to themselves (Kairouz, Liu, Steinke, ICML 2021, and Agarwal, Kairouz, Liu, NeurIPS 2021; bounds in
`fedlm.privacy.distributed`). Sums are modulo 2^ring_bits; a sum that wrapped around would be wrong and no less private,
and the grid leaves it ten standard deviations of room.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import RunError
from fedlm.messages import Fields
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


@dataclass(frozen=True)
class NoisedEncoding:
    """How clipped values become ring elements; public.

    Attributes:
        mechanism: of one round; its bound is in steps of the grid.
        step: of the grid.
        ring_bits: sums are modulo 2^ring_bits.
    """

    mechanism: DistributedNoise
    step: float
    ring_bits: int

    @property
    def fields(self) -> Fields:
        """As plain JSON, for `Parameters.agreed`."""
        return {
            "noise": self.mechanism.noise,
            "noise_multiplier": self.mechanism.noise_multiplier,
            "bound": self.mechanism.bound,
            "survivors": self.mechanism.survivors,
            "step": self.step,
        }


def least_survivors(recipe: Recipe, silos: int) -> int:
    """Silos that must be in a sum of so many, so that its noise is enough: all but those that may drop out."""
    spec = mask_of(recipe)
    assert spec is not None
    return silos - math.ceil(spec.dropouts * silos - 1e-9)


def noised_encoding(recipe: Recipe, silos: int, values: int) -> NoisedEncoding:
    """For a round of so many silos with so many values each.

    Raises:
        PrivacyError: no noise keeps the recipe's budget.
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
    rounds = recipe.federation.rounds
    return _encoding(spec.noise, spec.epsilon, spec.delta, spec.clip, rounds, silos, honest, values, ring_bits)


@lru_cache(maxsize=64)
def _encoding(
    noise: Noise,
    epsilon: float,
    delta: float,
    clip: float,
    rounds: int,
    silos: int,
    honest: int,
    values: int,
    ring_bits: int,
) -> NoisedEncoding:
    """The finest grid whose sums have room."""
    half = float(2 ** (ring_bits - 1) - 1)
    bound = half / (2 * silos)
    for _ in range(60):
        asked = DistributedNoise("silo", "zero-out", noise, None, bound, values, honest, count=rounds)
        found = calibrate(asked, epsilon, delta, silos)
        all_noise = noise_multiplier(found) * bound * math.sqrt(silos / honest)
        if silos * (bound + 1) + ROOM * all_noise <= half and found.silo_scale() <= LARGEST_SCALE:
            return NoisedEncoding(replace(found, count=1), clip / bound, ring_bits)
        bound = min(0.98 * bound, half / (silos + ROOM * all_noise / bound))
        if bound < 1:
            break
    raise RunError(
        f"a ring of {ring_bits} bits has no room for the noise of epsilon {epsilon:g} over {rounds} rounds",
        where="guards",
        fix="give the mask more `bits`, or ask for less",
    )


def hidden_noised(values: Tensor, how: NoisedEncoding, stream: SecretStream) -> Words:
    """A silo's ring elements, uint32 [n + 2]: noised values, 0 where the loss would be, and its weight, 1.

    Args:
        values: fp32 [n], of a norm within the clip.
        stream: nobody else may know its words, nor are they drawn again for other values.

    Raises:
        PrivacyError: the values are not finite, or their norm is beyond the clip.
    """
    mechanism = how.mechanism
    scaled = values.numpy().astype(np.float64) / how.step
    whole = conditional_round(scaled, mechanism.bound, mechanism.retry, stream)
    scale = mechanism.silo_scale()
    if mechanism.noise == "skellam":
        whole += skellam(stream, scale**2, whole.size)
    else:
        whole += discrete_gaussian(stream, scale, whole.size)
    ring: Words = (np.append(whole, [0, 1]) & (2**how.ring_bits - 1)).astype(np.uint32)  # two's complement: modulo
    return ring


def shown_noised(total: Words, silos: int, how: NoisedEncoding) -> tuple[Tensor, int]:
    """The means of values with noise, fp32 [n], and the weights' sum.

    Raises:
        RunError: no silos' elements have this sum.
    """
    if int(total[-1]) != silos:
        raise RunError(f"the aggregate is out of range: the weights' sum is {int(total[-1])}, of {silos} silos")
    signed = total[:-2].astype(np.int64)
    signed[signed >= 2 ** (how.ring_bits - 1)] -= 2**how.ring_bits
    return torch.from_numpy((signed * (how.step / silos)).astype(np.float32)), silos
