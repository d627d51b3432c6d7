"""Membership inference from losses: was this sequence among those that the model was trained on?

Three attacks, each a score per sequence, higher where it is likelier a member:

- `loss_scores`: the loss itself (Yeom, Giacomelli, Fredrikson, Jha, CSF 2018);
- `calibrated_scores`: how much lower it is than under a reference model, so that easy text is not taken for a member
  (Watson, Guo, Cormode, Sablayrolles, ICLR 2022);
- `lira_online`, `lira_offline`: the likelihood ratio attack, against shadow models that were trained with and without
  the sequence (Carlini, Chien, Nasr, Song, Terzis, Tramèr, "Membership Inference Attacks From First Principles", IEEE
  S&P 2022).

`judge` says how well a score tells members from others: the area under the ROC curve, which is 1/2 by chance, and the
true positive rate at a false positive rate of 1 %, which that paper asks for: an attack that is right about few people,
and knows it, is a leak that an average hides. Members and others must come from one distribution; if they differ in
date, source or length, the attack recognises that, and not membership.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import mannwhitneyu, norm
from torch import nn

from fedlm.errors import PrivacyError
from fedlm.evaluation.intervals import Interval, wilson
from fedlm.training.forward import sequence_nll
from fedlm.training.sequences import Encoded

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
SMALLEST = 1e-6
"""Of a standard deviation over shadow models, in the units of the scores: copies of one model say nothing."""


@dataclass(frozen=True)
class Outcome:
    """How well a score tells members from others.

    Attributes:
        auc: area under the ROC curve: P[member's score > other's], ties counted half.
        auc_interval: see `auc_interval`.
        tpr: share of members above the threshold that at most `fpr` of the others are above.
        tpr_interval: Wilson's, for that threshold as if it were fixed beforehand.
        members, others: how many there were. Below 1 / fpr others the threshold is their largest score.
    """

    auc: float
    auc_interval: Interval
    tpr: float
    tpr_interval: Interval
    fpr: float
    members: int
    others: int


def losses(model: nn.Module, sequences: Sequence[Encoded], batch_tokens: int = 4096, *, packing: bool = True) -> Vector:
    """Mean negative log-likelihood (nats) of each sequence's targets [n]; 0 of one without any."""
    sums, counts = sequence_nll(model, sequences, batch_tokens, packing=packing)
    return sums / np.maximum(counts, 1)


def loss_scores(values: Vector) -> Vector:
    """-loss [n]."""
    return -np.asarray(values, np.float64)


def calibrated_scores(values: Vector, reference: Vector) -> Vector:
    """Loss under the reference model - loss [n]; the reference has seen neither members nor others."""
    return np.asarray(reference, np.float64) - np.asarray(values, np.float64)


def logit_confidence(nll: Vector) -> Vector:
    """log(p / (1 - p)) of p = exp(-nll), near-normal over shadow models (section V-A of LiRA); nll above 0."""
    values = np.asarray(nll, np.float64)
    return -values - np.log(-np.expm1(-values))


def lira_online(target: Vector, shadows: Matrix, inside: NDArray[np.bool_], *, shared: bool = False) -> Vector:
    """log N(target; mu_in, s_in^2) - log N(target; mu_out, s_out^2) [n] (algorithm 1).

    Args:
        target: a statistic of each sequence under the attacked model [n], such as -loss or `logit_confidence`.
        shadows: the same under k models that the attacker trained [k, n].
        inside: which of them were trained on the sequence [k, n].
        shared: one variance for all sequences, within and without each; better below about 64 shadow models.

    Raises:
        PrivacyError: a shape is wrong, or a sequence has too few shadow models on one side: two, or one if `shared`.
    """
    x, values, mask = _checked(target, shadows, inside)
    with_it, without = _normal(values, mask, shared), _normal(values, ~mask, shared)
    found: Vector = norm.logpdf(x, *with_it) - norm.logpdf(x, *without)
    return found


def lira_offline(target: Vector, shadows: Matrix, *, shared: bool = False) -> Vector:
    """log P[Z <= target] for Z ~ N(mu_out, s_out^2) [n]: shadow models without the sequence are enough.

    The paper's 1 - P[Z > target], as its logarithm so that the far end keeps its order. Arguments and errors as
    `lira_online`; `shadows` [k, n] are all of models that never saw the sequence.
    """
    x, values, mask = _checked(target, shadows, np.zeros(np.shape(shadows), np.bool_))
    found: Vector = norm.logcdf(x, *_normal(values, ~mask, shared))
    return found


def judge(members: Vector, others: Vector, *, fpr: float = 0.01, confidence: float = 0.95) -> Outcome:
    """How well these scores tell members from others.

    Raises:
        PrivacyError: there are none on one side, a score is not a number, or `fpr` is not within (0, 1).
    """
    inside, outside = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if not len(inside) or not len(outside) or np.isnan(inside).any() or np.isnan(outside).any():
        raise PrivacyError("an attack is judged by scores of members and of others, all of them numbers")
    if not 0 < fpr < 1:
        raise PrivacyError(f"the false positive rate is {fpr}; it must be above 0 and below 1")
    area = float(mannwhitneyu(inside, outside, method="asymptotic").statistic) / (len(inside) * len(outside))
    hits = int((inside > threshold(outside, fpr)).sum())
    return Outcome(
        area,
        auc_interval(area, len(inside), len(outside), confidence),
        hits / len(inside),
        wilson(hits, len(inside), confidence),
        fpr,
        len(inside),
        len(outside),
    )


def threshold(others: Vector, fpr: float) -> float:
    """The score that at most a share `fpr` of the others is above."""
    allowed = math.floor(fpr * len(others) + 1e-9)
    return float(np.sort(others)[len(others) - 1 - allowed])


def auc_interval(auc: float, members: int, others: int, confidence: float = 0.95) -> Interval:
    """Score interval of an area under the ROC curve (Newcombe, Statistics in Medicine 25, 2006, method 5): the areas
    from which the observed one is within z standard errors, by Hanley and McNeil's variance at that area. Sound near
    0 and 1, where an interval around the estimate has width 0."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = (members + others) / 2 - 1

    def outside(area: float) -> float:
        spread = 1 + half * (1 - area) / (2 - area) + half * area / (1 + area)
        return (area - auc) ** 2 - z * z * area * (1 - area) * spread / (members * others)

    # An observed 0 or 1 is itself a root, and the other one is wanted.
    low = 0.0 if auc <= 0 else float(brentq(outside, 0.0, min(auc, 1 - 1e-9)))
    high = 1.0 if auc >= 1 else float(brentq(outside, max(auc, 1e-9), 1.0))
    return low, high


def _checked(target: Vector, shadows: Matrix, inside: NDArray[np.bool_]) -> tuple[Vector, Matrix, NDArray[np.bool_]]:
    x, values, mask = np.asarray(target, np.float64), np.asarray(shadows, np.float64), np.asarray(inside)
    if values.ndim != 2 or x.shape != values.shape[1:] or mask.shape != values.shape or mask.dtype != np.bool_:
        raise PrivacyError(
            f"{x.shape} scores, {values.shape} of shadow models and {mask.shape} marks do not fit together",
            fix="give [n], [k, n] and boolean [k, n]",
        )
    return x, values, mask


def _normal(values: Matrix, mask: NDArray[np.bool_], shared: bool) -> tuple[Vector, Vector]:
    """Mean [n] and standard deviation [n] of each sequence's values [k, n] where the mask is set."""
    counts = mask.sum(axis=0)
    if counts.min() < (1 if shared else 2) or (counts - 1).sum() < 1:
        raise PrivacyError(
            f"a sequence has {counts.min()} shadow models on one side, which gives no spread",
            fix="train more of them, each on a random half, or share the variance",
        )
    mean = np.where(mask, values, 0.0).sum(axis=0) / counts
    squares = np.where(mask, values - mean, 0.0) ** 2
    if shared:
        variance = np.full(values.shape[1], squares.sum() / (counts - 1).sum())
    else:
        variance = squares.sum(axis=0) / (counts - 1)
    return mean, np.maximum(np.sqrt(variance), SMALLEST)
