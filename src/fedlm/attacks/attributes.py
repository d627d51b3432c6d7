"""Property inference: what does one update say of its silo's rows as a whole, such as whether a topic is among them?

Melis, Song, De Cristofaro, Shmatikov, "Exploiting Unintended Feature Leakage in Collaborative Learning", IEEE S&P 2019,
section 5 (the passive attack). The coordinator has public rows of its own, deals them to shadow silos with the property
and without it, trains these from the broadcast model as the recipe says, and learns to tell their updates apart; then
it looks at real ones. What protects real updates (noise, clipping, sums with others) it does to shadow updates too.

Three things differ from the paper. An update is not read number by number but through random projections (`sketched`),
a few for each matrix; of LoRA they are those of the product, in which the paper's features would be hidden by the
factors' common freedom. The classifier is linear, least squares with an L2 penalty, in closed form. And a target is a
round's update of a silo, not the gradient of a batch.

A property of all rows together is no secret of any one row: privacy with the unit `example` bounds what is told of a
row, and of k rows only k times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from fedlm.attacks.membership import Vector, judge
from fedlm.errors import PrivacyError
from fedlm.evaluation.intervals import Interval, wilson
from fedlm.messages import Tensors
from fedlm.randomness import torch_generator

Matrix = NDArray[np.float64]
Marks = NDArray[np.bool_]

NUMBERS = 4096
"""Of a sketch, shared evenly by its matrices."""
PENALTIES = tuple(10.0**power for power in range(-2, 7))
"""lambda's that are tried; the best by leaving one out is taken."""
A, B = "lora_A.weight", "lora_B.weight"


def sketched(start: Tensors, update: Tensors, *, numbers: int = NUMBERS, seed: int = 0) -> Vector:
    """An update in few numbers [matrices x k], of norm 1: u_i^T D v_i for the change D of each matrix, i = 1, ..., k.

    u_i and v_i are random signs, the same in every call with one seed, so that the mean over i of the products of two
    sketches estimates the inner product of the two changes. Where A and B of LoRA are trained, D is the change of B A.

    Args:
        start: what the round began with, by parameter name; only read where it holds LoRA's factors.
        update: the changes; matrices [out, in] and vectors [in].
        numbers: k is this divided by the number of matrices, and at least 1.

    Raises:
        PrivacyError: there is nothing in the update, a factor is missing in `start`, or it is not finite.
    """
    pairs = [name for name in sorted(update) if name.endswith(B) and name.removesuffix(B) + A in update]
    factors = {n for name in pairs for n in (name, name.removesuffix(B) + A)}
    single = [name for name in sorted(update) if name not in factors]
    if missing := sorted(factors - set(start)):
        raise PrivacyError(f"'{missing[0]}' is in the update, and not in what the round began with")
    if not update:
        raise PrivacyError("there is nothing in the update")
    each = max(1, numbers // (len(pairs) + len(single)))
    found = []
    for name in pairs:
        a, b = name.removesuffix(B) + A, name
        u, v = _signs(seed, b, each, len(update[b])), _signs(seed, a, each, update[a].shape[1])
        before = [t.double() for t in (start[a], start[b])]
        after = [before[0] + update[a].double(), before[1] + update[b].double()]
        found.append(_bilinear(u @ after[1], after[0], v) - _bilinear(u @ before[1], before[0], v))
    for name in single:
        change = update[name].double().reshape(-1, update[name].shape[-1])
        u, v = _signs(seed, f"{name} rows", each, len(change)), _signs(seed, name, each, change.shape[1])
        found.append(_bilinear(u, change, v))
    whole = torch.cat(found)
    norm = float(whole.norm())
    if not np.isfinite(norm):
        raise PrivacyError("the update is not finite, so nothing can be read in it")
    return np.asarray((whole / norm if norm > 0 else whole).numpy(), np.float64)


def _bilinear(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """left_i^T M right_i [k] of [k, out], [out, in] and [k, in]."""
    return ((left @ middle) * right).sum(1)


@lru_cache(maxsize=256)
def _signs(seed: int, name: str, count: int, length: int) -> Tensor:
    drawn = torch.randint(0, 2, (count, length), generator=torch_generator(seed, "sketch of an update", name))
    return drawn.double() * 2 - 1


@dataclass(frozen=True)
class Linear:
    """x -> w (x - centre) / spread + offset, above 0 where x has the property.

    Attributes:
        penalty: lambda, which was chosen.
    """

    weights: Vector
    centre: Vector
    spread: Vector
    offset: float
    penalty: float

    def scores(self, features: Matrix) -> Vector:
        """[n] of features [n, k]."""
        found: Vector = ((np.asarray(features) - self.centre) / self.spread) @ self.weights + self.offset
        return found


def learn(features: Matrix, marks: Marks, penalties: Sequence[float] = PENALTIES) -> Linear:
    """min_w |X w + o - y|^2 + lambda |w|^2 over features of mean 0 and variance 1, y = 1 with the property and -1
    without; lambda by the least squared error of each shadow under the fit to all others, in closed form.

    Args:
        features: of shadow updates [n, k].
        marks: which have the property [n].

    Raises:
        PrivacyError: the shapes do not fit, a number is not finite, or one of the two kinds has fewer than two.
    """
    x, truth = np.asarray(features, np.float64), np.asarray(marks)
    if x.ndim != 2 or truth.shape != x.shape[:1] or truth.dtype != np.bool_ or not np.isfinite(x).all():
        raise PrivacyError("shadow updates need features [n, k], all of them finite, and a mark for each")
    if min(truth.sum(), (~truth).sum()) < 2:
        raise PrivacyError(
            f"of {len(truth)} shadow silos {int(truth.sum())} have the property: two of either kind are needed",
            fix="deal rows to more shadow silos",
        )
    centre, spread = x.mean(axis=0), x.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    y = np.where(truth, 1.0, -1.0)
    offset = float(y.mean())
    left, singular, right = np.linalg.svd((x - centre) / spread, full_matrices=False)
    target = left.T @ (y - offset)
    errors = []
    for penalty in penalties:
        shrunk = singular**2 / (singular**2 + penalty)
        leverage = (left**2) @ shrunk + 1 / len(y)
        errors.append(float(np.mean(((y - offset - left @ (shrunk * target)) / (1 - leverage)) ** 2)))
    penalty = penalties[int(np.argmin(errors))]
    weights = right.T @ (singular / (singular**2 + penalty) * target)
    return Linear(weights, centre, spread, offset, penalty)


@dataclass(frozen=True)
class Told:
    """How well updates tell the property.

    Attributes:
        accuracy, interval: share of silos that were guessed right; Wilson's interval.
        auc, auc_interval: that one with the property scores higher than one without; see `membership.auc_interval`.
        majority: what the more frequent answer gets.
        p_value: of so many right, or more, if each were guessed with the majority's probability.
        silos: how many were guessed.
    """

    accuracy: float
    interval: Interval
    auc: float
    auc_interval: Interval
    majority: float
    p_value: float
    silos: int


def told(scores: Vector, marks: Marks) -> Told:
    """What came of scores [n], above 0 where the property is guessed, against the truth [n].

    Raises:
        PrivacyError: there are none with the property, or none without it; or a score is not a number.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(marks)
    ranked = judge(values[truth], values[~truth])
    right = int(((values > 0) == truth).sum())
    majority = max(truth.mean(), 1 - truth.mean())
    chance = float(binomtest(right, len(truth), majority, alternative="greater").pvalue)
    return Told(
        right / len(truth),
        wilson(right, len(truth)),
        ranked.auc,
        ranked.auc_interval,
        float(majority),
        chance,
        len(truth),
    )
