"""Preference losses on log-probabilities of whole answers, each as its paper and TRL have it.

`logps` are sums over an answer's tokens of log pi(token | before) [n, 2], column 0 the chosen answer and column 1 the
rejected one; `lengths` [n, 2] their numbers of tokens; `reference` [n, 2] the same sums under the reference policy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fedlm.recipe.preference import PreferenceSpec


def pair_losses(
    spec: PreferenceSpec, logps: Tensor, lengths: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Losses [n] and rewards [n, 2] of pairs.

    dpo    -log sigmoid(beta D), with D the difference of log pi/pi_ref between chosen and rejected; with label
           smoothing e: (1 - e) of it and e of -log sigmoid(-beta D) (Mitchell, 2023: conservative DPO)
    ipo    (D' - 1 / (2 tau))^2, with D' the same difference per token, as the authors and TRL have it
    orpo   -lambda log sigmoid(log odds ratio), odds of the geometric mean probability of a token; its likelihood term
           is the caller's
    simpo  -log sigmoid(beta (mean log pi of the chosen - of the rejected) - gamma)
    """
    beta = spec.strength
    if spec.loss in ("dpo", "ipo"):
        assert reference is not None
        ratios = logps - reference
        rewards = beta * ratios
        if spec.loss == "ipo":
            per_token = ratios / lengths
            return (per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta)) ** 2, rewards
        margin = rewards[:, 0] - rewards[:, 1]
        smoothing = spec.label_smoothing
        return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin), rewards
    means = logps / lengths
    rewards = beta * means
    if spec.loss == "orpo":
        odds = means - _log_complement(means)
        return -beta * logsigmoid(odds[:, 0] - odds[:, 1]), rewards
    return -logsigmoid(rewards[:, 0] - rewards[:, 1] - spec.gamma), rewards


def kto_losses(
    spec: PreferenceSpec, logps: Tensor, reference: Tensor, wanted: Tensor, baseline: float
) -> tuple[Tensor, Tensor]:
    """Losses [n] and rewards [n] of single answers: 1 - sigmoid(+-(reward - beta baseline)), weighted by verdict.

    Args:
        wanted: [n], bool.
        baseline: KL of the policy to the reference over mismatched answers, at least 0, without a gradient.
    """
    rewards = spec.strength * (logps - reference)
    gain = rewards - spec.strength * baseline
    weights = torch.where(wanted, spec.desirable_weight, spec.undesirable_weight)
    return weights * (1 - torch.sigmoid(torch.where(wanted, gain, -gain))), rewards


def _log_complement(logps: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without loss of digits at either end (Maechler, 2012)."""
    x = logps.clamp(max=-1e-7)  # a mean probability of exactly 1 has no odds
    near = x > -0.6931471805599453
    return torch.where(
        near, torch.log(-torch.expm1(torch.where(near, x, -1.0))), torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    )
