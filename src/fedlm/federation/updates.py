"""What an update must be before it may touch the model: complete, of the right shapes, finite, of a credible weight.

Every rule looks at one update alone, so updates are judged as they arrive and none is kept for comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from fedlm.algorithms.base import Algorithm, flat_view
from fedlm.errors import UpdateRefused
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS

LARGEST = torch.finfo(torch.float32).max / 2**20
"""Largest |weight * value| accepted: a million such updates still have a finite fp32 sum."""

LONGEST_DOCUMENT = 2**24
"""Tokens that one row of pre-training text may have before its silo's weight is absurd (a long novel has 2**18)."""


def check_update(
    silo: str,
    tensors: Mapping[str, torch.Tensor],
    expected: dict[str, torch.Size],
    weight: float,
    *,
    max_weight: float,
    dtypes: tuple[torch.dtype, ...] = Algorithm.update_dtypes,
) -> None:
    """Refuse an update that cannot be averaged.

    Args:
        silo: who sent it, for the message.
        tensors: the update.
        expected: exactly these names and shapes (`Algorithm.expected_update`).
        weight: what the update counts for in the mean.
        max_weight: the most that this silo can honestly claim (`largest_weight`).
        dtypes: those that tensors may have (`Algorithm.update_dtypes`).

    Raises:
        UpdateRefused: naming the silo and the tensor: missing or extra name, other shape, another dtype, a value that
            is not finite or overflows the sum; or a weight that is not finite, not positive or too large.
    """
    if not math.isfinite(weight) or weight <= 0:
        raise UpdateRefused(f"the update's weight is {weight}, not a positive number", where=silo)
    if weight > max_weight:
        raise UpdateRefused(f"the update's weight {weight:g} is above {max_weight:g}, the most possible", where=silo)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UpdateRefused(f"the update lacks {_listed(missing)}", where=silo)
    if extra := sorted(tensors.keys() - expected.keys()):
        raise UpdateRefused(f"the update has {_listed(extra)}, which nobody asked for", where=silo)
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            raise UpdateRefused(f"'{name}' has shape {list(tensor.shape)} instead of {list(shape)}", where=silo)
        if tensor.dtype not in dtypes or tensor.layout is not torch.strided:
            kind = "floating-point numbers" if dtypes[0].is_floating_point else str(dtypes[0])
            raise UpdateRefused(f"'{name}' is {tensor.dtype}, not {kind}", where=silo)
    _check_values(silo, tensors, LARGEST / weight)


def _check_values(silo: str, tensors: Mapping[str, torch.Tensor], largest: float) -> None:
    """One read of every value and no copy: minimum and maximum are NaN as soon as one value is."""
    whole = flat_view([tensors[name] for name in sorted(tensors)]) if isinstance(tensors, dict) else None
    if whole is not None and _magnitude(whole) <= largest:
        return
    for name, tensor in tensors.items():
        magnitude = _magnitude(tensor)
        if not math.isfinite(magnitude):
            raise UpdateRefused(f"'{name}' holds values that are not finite (NaN or infinity)", where=silo)
        if magnitude > largest:
            raise UpdateRefused(f"'{name}' holds values up to {magnitude:g}, which would overflow the sum", where=silo)


def _magnitude(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN if any value is NaN."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor)
    return abs(float(low)) if math.isnan(low) else max(-float(low), float(high))


def largest_weight(recipe: Recipe, rows: int) -> float:
    """The most that an honest silo can claim, from what it declared at `hello` and the recipe's bounds.

    `rows` is its number of training rows, and an example has at most `max_length` target tokens. A silo that wants to
    count for more must lie before the run starts, on its data card, where the operator sees it.
    """
    spec, longest = recipe.federation.algorithm, recipe.training.max_length
    if ALGORITHMS[spec.name].equal_weights or spec.weights == "equal":
        return 1.0
    if spec.weights == "tokens":
        return float(rows * largest_tokens(recipe))
    # Pre-training cuts a document into sequences; nobody but the silo knows into how many.
    facts = TASKS[recipe.task]
    most = facts.sequences if facts.one_per_row else math.ceil(LONGEST_DOCUMENT / max(longest - 1, 1))
    return float(rows * most)


def largest_tokens(recipe: Recipe) -> int:
    """The most target tokens that one row can have."""
    facts = TASKS[recipe.task]
    return recipe.training.max_length * facts.sequences if facts.one_per_row else LONGEST_DOCUMENT


def _listed(names: list[str], limit: int = 3) -> str:
    """Names for a message, cut in number and length: a silo chooses its own keys."""
    shown = ", ".join(repr(name[:80]) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
