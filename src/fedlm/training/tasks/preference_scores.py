"""What held-out answers and their probabilities say of a model: loss, rewards, and which answer is the likelier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.recipe.preference import PreferenceSpec
from fedlm.training.objective import Figures
from fedlm.training.sequences import Example
from fedlm.training.tasks.preference_losses import kto_losses, pair_losses

Floats = NDArray[np.float64]
Found = tuple[Figures, dict[str, list[Any]]]
"""Figures, and by row under 'reward' whether its reward is right, under 'nll' its loss, of which 'tokens' says that it
counts once."""


@dataclass(frozen=True)
class Scored:
    """Examples of one width, as `fedlm.training.tasks.preference` makes them, with what models give them."""

    examples: Sequence[Example]
    logps: Floats
    """[n, width], summed over an answer's tokens."""
    lengths: NDArray[np.int64]
    """[n, width]"""
    reference: Floats | None
    """[n, width], like `logps`."""

    @property
    def weights(self) -> Floats:
        return np.array([example.facts.get("weight", 1.0) for example in self.examples])


def pairs(spec: PreferenceSpec, scored: Scored) -> Found:
    """Of rows with two answers. KTO's loss takes them one by one; their rewards compare as any others."""
    logps, lengths = scored.logps[:, :2], scored.lengths[:, :2]
    if spec.loss == "kto":
        each, singly, _ = _kto(spec, scored)
        losses, rewards = each.reshape(-1, 2).mean(1), singly.reshape(-1, 2)
        logps, lengths = scored.logps[:, 0].reshape(-1, 2), scored.lengths[:, 0].reshape(-1, 2)
    else:
        reference = None if scored.reference is None else torch.from_numpy(scored.reference[:, :2])
        found = pair_losses(spec, torch.from_numpy(logps), torch.from_numpy(lengths), reference)
        losses, rewards = found[0].numpy(), found[1].numpy()
        if spec.loss == "orpo":
            tokens = scored.lengths[:, [0, 2]].sum()
            losses = losses - (scored.logps[:, 0] + scored.logps[:, 2]) * len(losses) / tokens
        losses = losses * scored.weights
    figures, items = _rewards(losses, rewards[:, 0] - rewards[:, 1])
    likelier = _half_ties(logps[:, 0] / lengths[:, 0] - logps[:, 1] / lengths[:, 1])
    figures["ranking_accuracy"] = (float(likelier.sum()), float(len(likelier)))
    for name, i in (("chosen_logp", 0), ("rejected_logp", 1)):
        figures[name] = (float(logps[:, i].sum()), float(lengths[:, i].sum()))
    return figures, items


def judged_answers(spec: PreferenceSpec, scored: Scored) -> Found:
    """Of KTO's rows with one answer: a reward is right on its verdict's side of the baseline, and the margin is how far
    it is on that side."""
    losses, rewards, baseline = _kto(spec, scored)
    wanted = _wanted(scored)
    figures, items = _rewards(losses, np.where(wanted, 1.0, -1.0) * (rewards - spec.strength * baseline))
    for name, of in (("chosen_logp", wanted), ("rejected_logp", ~wanted)):
        if of.any():
            figures[name] = (float(scored.logps[of, 0].sum()), float(scored.lengths[of, 0].sum()))
    return figures, items


def _kto(spec: PreferenceSpec, scored: Scored) -> tuple[Floats, Floats, float]:
    """Weighted losses [n], rewards [n] and the baseline over all of the silo's held-out rows."""
    assert scored.reference is not None
    baseline = max(0.0, float((scored.logps[:, 1] - scored.reference[:, 1]).mean()))
    policy, reference = torch.from_numpy(scored.logps[:, 0]), torch.from_numpy(scored.reference[:, 0])
    losses, rewards = kto_losses(spec, policy, reference, torch.from_numpy(_wanted(scored)), baseline)
    return losses.numpy() * scored.weights, rewards.numpy(), baseline


def _wanted(scored: Scored) -> NDArray[np.bool_]:
    return np.array([example.facts["wanted"] > 0.5 for example in scored.examples])


def _rewards(losses: Floats, margins: Floats) -> Found:
    right, rows = _half_ties(margins), float(len(margins))
    figures = {
        "loss": (float(losses.sum()), rows),
        "reward_accuracy": (float(right.sum()), rows),
        "reward_margin": (float(margins.sum()), rows),
    }
    return figures, {"reward": right.tolist(), "nll": losses.tolist(), "tokens": [1] * len(losses)}


def _half_ties(margins: Floats) -> Floats:
    """1 where positive, one half where zero: a policy that is the reference says nothing, and is right by chance."""
    right: Floats = np.sign(margins) / 2 + 0.5
    return right
