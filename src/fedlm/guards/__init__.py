"""What happens to an update on its way: one file per guard."""

from __future__ import annotations

from collections.abc import Sequence

from fedlm.guards.base import Guard
from fedlm.guards.blockwise import Int4, Int8
from fedlm.guards.cast import BFloat16, Float16
from fedlm.guards.chain import Chain, Key, update_key
from fedlm.guards.lowrank import LowRank
from fedlm.guards.randomk import RandomK
from fedlm.guards.topk import TopK
from fedlm.recipe.guards import GuardSpec

CLASSES: dict[str, type[Guard]] = {
    "bf16": BFloat16,
    "fp16": Float16,
    "int8": Int8,
    "int4": Int4,
    "topk": TopK,
    "randk": RandomK,
    "lowrank": LowRank,
}


def get_chain(specs: Sequence[GuardSpec], *, feedback: bool | None = None) -> Chain | None:
    """The chain that a recipe asks for, or None for an empty one.

    Args:
        feedback: whether what is lost comes back later; by default as the specs say.
    """
    if not specs:
        return None
    if feedback is None:
        feedback = any(spec.error_feedback for spec in specs)
    return Chain([CLASSES[spec.name](spec, unbiased=not feedback) for spec in specs], feedback=feedback)


__all__ = ["CLASSES", "Chain", "Guard", "Key", "get_chain", "update_key"]
