"""What lies under a mask: how an update's values and a silo's weight become the numbers that are added up.

Masking itself is no guard's work: it takes several exchanges between the silos (`fedlm.privacy.secagg`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fedlm.errors import UpdateRefused
from fedlm.guards.noised import NoisedEncoding, noised_encoding, shown_noised
from fedlm.messages import Fields
from fedlm.privacy.secagg.graph import Risk
from fedlm.privacy.secagg.message import Words
from fedlm.privacy.secagg.quantise import Encoding, decode, encode
from fedlm.randomness import numpy_generator
from fedlm.recipe.guards import GuardSpec, mask_bound, mask_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.privacy import noised_by_silos
from fedlm.recipe.schema import Recipe

LOSSES = 32.0
"""The largest mean loss that is told, in nats; it travels as one value more, as a share of this."""

BESIDE = 2
"""Numbers beside the update's values: the training loss, in whose place is what a silo adds to the count of updates
within the clip where that moves; and the weight."""

MASKS = "masks"
"""Field of a verb whose answer is masked: the protocol's message."""

OF = "of"
"""Field of the protocol's own verbs: the verb whose answers are added up, where that is not 'train'."""


def risk_of(spec: GuardSpec) -> Risk:
    """What the recipe's mask must withstand, in the protocol's words."""
    return Risk(spec.dropouts, spec.corrupt, malicious=spec.coordinator == "malicious")


def encoding(recipe: Recipe, silos: int, length: int, clip: float | None = None) -> Encoding | NoisedEncoding:
    """How the values of so many silos are counted.

    Args:
        length: elements of a silo's vector.
        clip: of the round, where it moves.

    Raises:
        RunError: their sum does not fit.
        PrivacyError: no noise keeps the recipe's budget, or the count within the clip spends all of it.
    """
    spec = mask_of(recipe)
    if noised_by_silos(recipe):
        return noised_encoding(recipe, silos, length - BESIDE, clip)
    bound = mask_bound(recipe)
    assert spec is not None and bound is not None  # the recipe was checked
    return Encoding(bound, spec.bits, spec.max_weight, silos)


def weight_under(recipe: Recipe, spec: GuardSpec, fields: Fields) -> int:
    """A silo's weight as a whole number from 1 to `max_weight`: its examples; with `weights: tokens` its target tokens
    in units of `training.max_length`.

    Args:
        fields: what the silo counted in its round; they stay there.
    """
    algorithm = recipe.federation.algorithm
    if ALGORITHMS[algorithm.name].equal_weights or algorithm.weights == "equal":
        return 1
    if algorithm.weights == "tokens":
        count = math.ceil(int(fields["row_targets"]) / recipe.training.max_length)
    else:
        count = int(fields["rows"])
    return max(1, min(count, spec.max_weight))


def hidden(
    values: Tensor, loss: float, weight: int, how: Encoding, key: tuple[str | int, ...], seed: int
) -> tuple[Words, int]:
    """A silo's ring elements, uint32 [n + BESIDE], and how many values were cut at the bound.

    Args:
        values: fp32 [n].
        loss: mean of the silo's round; cut at `LOSSES`.
        key: for the rounding, with the run's seed: the same bits on every engine and in every attempt.

    Raises:
        UpdateRefused: a value is not finite.
    """
    if not math.isfinite(loss):
        raise UpdateRefused("the training loss is not finite", fix="lower the learning rate")
    told = max(-1.0, min(1.0, loss / LOSSES)) * how.scale
    row = np.append(values.numpy(), np.float32(told))
    return encode(row, weight, how, numpy_generator(seed, "mask", *key))


def shown(total: Words, silos: int, how: Encoding | NoisedEncoding) -> tuple[Tensor, float, int]:
    """The weighted means of values, fp32 [n], and of losses, and the weights' sum.

    Raises:
        RunError: no silos' elements have this sum.
    """
    if isinstance(how, NoisedEncoding):
        noised, count = shown_noised(total, silos, how)
        return noised, 0.0, count
    means, weights = decode(total, silos, how)
    return torch.from_numpy(means[:-1].astype(np.float32)), float(means[-1] / how.scale * LOSSES), weights
