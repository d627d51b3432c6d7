"""Every kind of trained parameters on a tiny model, with examples of unequal length for every admitted objective."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from fedlm.models.adapters import attach, trainable
from fedlm.recipe.heads import RewardSpec
from fedlm.recipe.preference import PreferenceSpec
from fedlm.recipe.schema import AdapterSpec, TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.objective import Likelihood, Objective, Tools
from fedlm.training.sequences import Encoded, Example
from fedlm.training.tasks.base import REFERENCE
from fedlm.training.tasks.classify import LABEL, CrossEntropy
from fedlm.training.tasks.label_words import WordLoss
from fedlm.training.tasks.preference import PreferenceObjective
from fedlm.training.tasks.reward import BradleyTerry
from tests.training.helpers import sequence

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "lora-sb": {"kind": "lora-sb", "rank": 4},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "virtual_tokens": 5},
    "p-tuning": {"kind": "p-tuning", "virtual_tokens": 5, "encoder_hidden": 16},
    "p-tuning-lstm": {"kind": "p-tuning", "virtual_tokens": 5, "encoder": "lstm", "encoder_hidden": 16},
    "prefix": {"kind": "prefix", "virtual_tokens": 5},
    "prompt-projection": {"kind": "prompt-projection", "virtual_tokens": 5, "intrinsic_dim": 12},
    "full": {"kind": "full"},
}
SPEC = TrainingSpec(steps=1, max_length=64, clip_norm=None)


def made(base: Any, kind: str, outputs: int = 0) -> Module:
    """A model whose trained parameters are not at their first values, in training mode."""
    model = attach(base.requires_grad_(False), AdapterSpec.model_validate(KINDS[kind]), 0, outputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def untied(base: Any) -> Any:
    """The base with an output matrix of its own."""
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    base.config.tie_word_embeddings = False
    return base


def texts(count: int = 6) -> list[Example]:
    return [Example((sequence((i + 1, 5 + 5 * i % 17), answer=2 + i % 3),)) for i in range(count)]


def whole(example: Example) -> Example:
    """The same without targets, for heads."""
    return Example(tuple(Encoded(s.ids, np.zeros(len(s), np.bool_)) for s in example.sequences), example.facts)


def pairs(third: bool = False, count: int = 5) -> list[Example]:
    found = []
    for i in range(count):
        pair = [sequence((i + 2, 6), (10 + 2 * i + side, 2 + (i + side) % 4), answer=3) for side in (0, 1)]
        more = [sequence((i + 2, 6), answer=5)] if third else []
        found.append(Example((*pair, *more), {f"{REFERENCE}0": -17.0 + i, f"{REFERENCE}1": -16.0 - i / 2}))
    return found


def task(name: str, model: Module, spec: TrainingSpec = SPEC) -> tuple[Objective, list[Example]]:
    """An objective, and examples for it."""
    tools = Tools(model, spec)
    if name == "text":
        return Likelihood(tools), texts()
    if name == "classify":
        return CrossEntropy(tools), [Example(whole(e).sequences, {LABEL: i % 3}) for i, e in enumerate(texts())]
    if name == "label-words":
        words = WordLoss(tools, [])
        words.words = [30, 40, 50]
        return words, [Example((sequence((i + 1, 5 + 5 * i % 17), answer=1),), {LABEL: i % 3}) for i in range(6)]
    if name == "reward":
        return BradleyTerry(tools, RewardSpec(center=0.01)), [whole(e) for e in pairs()]
    preference = PreferenceSpec(loss=name, beta=0.3)  # type: ignore[arg-type]
    return PreferenceObjective(tools, preference), pairs(third=name == "orpo")


def truth(objective: Objective, model: Module, examples: Sequence[Example]) -> list[dict[str, Tensor]]:
    """Each example's gradient by the ordinary loop's packed forward pass: a step of that example alone."""
    found = []
    with packed(model) if objective.tools.spec.packing else nullcontext():
        model.train()
        for example in examples:
            model.zero_grad()
            terms, divisor = objective.terms(objective.begin([example]))
            (terms.sum() / divisor).backward()  # type: ignore[no-untyped-call]
            gradients = {n: p.grad for n, p in trainable(model).items()}
            found.append({n: torch.zeros(()) if g is None else g.clone() for n, g in gradients.items()})
    model.zero_grad()
    return found


def norm(tensors: Any) -> float:
    return float(sum(float(t.double().square().sum()) for t in tensors)) ** 0.5


def clipped(gradients: Sequence[dict[str, Tensor]], clip: float) -> dict[str, Tensor]:
    """The definition: sum of min(1, C / |g_i|) g_i."""
    factors = [min(1.0, clip / norm(g.values())) for g in gradients]
    return {n: sum(f * g[n] for f, g in zip(factors, gradients, strict=True)) for n in gradients[0]}  # type: ignore[misc]


def off(found: dict[str, Tensor], true: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's tensors, relative to the true one's norm or a thousandth of all."""
    least = 1e-3 * norm(true.values())
    return max(norm([found[n] - true[n]]) / max(norm([true[n]]), least) for n in true)
