"""Before a private training: are the per-example gradients those of the examples by themselves?

A layer that mixes its batch, a parameter that is read where nobody looks, a wrong rule for a layer: each would train on
without a sign, and the guarantee would be void. Three made-up examples of different lengths go through one pass, and
each through a pass of its own by plain autograd.

The examples are drawn, not taken from the silo's rows, so that whether a run starts says nothing about them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fedlm.errors import TrainingError
from fedlm.messages import Tensors
from fedlm.training.attention import causal_model
from fedlm.training.objective import Objective
from fedlm.training.padded_attention import short_rows
from fedlm.training.private.gradients import Way, alone, own, taken_down, without_dropout
from fedlm.training.private.losses import ONE_TARGET
from fedlm.training.sequences import Encoded, Example

LENGTHS = (7, 19, 12)
"""Tokens of the examples' sequences, and one more for each further one."""

TARGETS = 4
"""Of a sequence that has any: its last tokens."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Relative to the norm of a parameter's gradient, by the model's dtype. Sums in another order differ by about 1e-6 in
fp32, and in bf16 by 1e-2, or 1e-1 of a gradient that is small beside others. What is wrong differs by about 1."""

NORM_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Relative, of the norm over all parameters."""

LEAST = 1e-3
"""A parameter's gradient counts as at least so much of the example's whole gradient: below is rounding."""

PROBE = 0.02
"""Deviation of what a parameter that is zero (LoRA's B, a head) is set to meanwhile: it would hide the others'."""


def check_gradients(
    objective: Objective, parameters: dict[str, Parameter], like: Example, *, way: Way | None = None
) -> None:
    """Compare one pass over three examples with each by itself. The parameters are afterwards as they were.

    Args:
        objective: not packing, its model in training mode.
        like: an example of the data, of which only the form is read: how many sequences, whether they have targets,
            and the names of its facts.

    Raises:
        TrainingError: they differ, naming the parameter that does most.
    """
    if way == "micro":
        return
    model = objective.tools.model
    config = causal_model(model).config
    examples = probes(like, int(config.vocab_size), 1 if isinstance(objective, ONE_TARGET) else TARGETS)
    precision = torch.float32 if config.dtype == torch.float32 else torch.bfloat16
    # both sides attend alike: in bf16 two kernels round small gradients of keys apart by a third of their size
    with without_dropout(model), _nothing_at_zero(parameters), short_rows(model):
        tape, norms = taken_down(objective, parameters, examples, way)
        true = compare(
            lambda name, i: own(tape, name, i),
            (alone(objective, parameters, example)[0] for example in examples),
            TOLERANCE[precision],
        )
    if not torch.allclose(norms.cpu(), true, rtol=NORM_TOLERANCE[precision], atol=0.0):
        worst = float(((norms.cpu() - true).abs() / true).max())
        raise TrainingError(
            f"the norms of per-example gradients are off by up to {worst:.1e} of their size, found in the way "
            f"'{way or 'by layer'}'"
        )


def compare(found: Callable[[str, int], Tensor | None], apart: Iterable[Tensors], tolerance: float) -> Tensor:
    """Gradients that one pass over several examples gives each, against each example's own; the norms of these [n].

    Args:
        found: a parameter's gradient of an example; None where there is none.
        apart: the examples' own, one after another: of large models no two need be in memory.

    Raises:
        TrainingError: a parameter has none, or other ones; names the one that is furthest off.
    """
    worst, furthest, norms = 0.0, "", []
    for i, gradients in enumerate(apart):
        whole = _norm(gradients.values())
        norms.append(whole)
        for name, truth in gradients.items():
            here = found(name, i)
            if here is None and not truth.any():
                continue
            if here is None or here.shape != truth.shape:
                raise TrainingError(
                    f"of '{name}' one pass over several examples leaves no gradient of example {i} by itself",
                    fix="train other parameters, or in the way 'micro'",
                )
            size = max(_norm([truth]), LEAST * whole)
            off = _norm([here.float() - truth.float()]) / size if size else float(here.any())
            if not off <= worst:  # what is not a number is worst of all
                worst, furthest = off, name
    if not worst <= tolerance:
        raise TrainingError(
            f"the gradients of single examples come out wrong for '{furthest}': in one pass with others they differ by "
            f"{worst:.1e} of their size from those of each example by itself",
            fix="this model mixes examples of a batch, or a layer's rule is wrong; train other parameters",
        )
    return torch.tensor(norms, dtype=torch.float64)


def probes(like: Example, vocabulary: int, most: int = TARGETS) -> list[Example]:
    """Three examples of this form and different lengths, of drawn tokens, with so many targets where it has any. Their
    facts are 0."""
    generator = np.random.Generator(np.random.Philox(0))
    found = []
    for length in LENGTHS:
        sequences = []
        for place, sequence in enumerate(like.sequences):
            size = length + place
            targets = np.arange(size) >= (size - most if sequence.loss.any() else size)
            sequences.append(Encoded(generator.integers(0, vocabulary, size).astype(np.int32), targets))
        found.append(Example(tuple(sequences), dict.fromkeys(like.facts, 0.0)))
    return found


@contextmanager
def _nothing_at_zero(parameters: dict[str, Parameter]) -> Iterator[None]:
    zeros = [p for p in parameters.values() if not p.any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in zeros:
            p.copy_(torch.randn(p.shape, generator=generator).mul_(PROBE))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in zeros:
                p.zero_()


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
