"""What happens to an update on its way: one file per guard."""

from __future__ import annotations

from collections.abc import Sequence

from fedlm.guards.base import Guard
from fedlm.guards.blockwise import Int4, Int8
from fedlm.guards.cast import BFloat16, Float16
from fedlm.guards.chain import REST, Chain, Key, shared_key, update_key
from fedlm.guards.lowrank import LowRank
from fedlm.guards.randomk import RandomK
from fedlm.guards.topk import TopK
from fedlm.recipe.guards import MASK, GuardSpec

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
    """The chain that a recipe asks for, or None for an empty one. A mask is no part of it: it hides what the chain
    leaves (`fedlm.guards.mask`).

    Args:
        feedback: whether what is lost comes back later; by default as the specs say.
    """
    specs = [spec for spec in specs if spec.name != MASK]
    if not specs:
        return None
    if feedback is None:
        feedback = any(spec.error_feedback for spec in specs)
    return Chain([CLASSES[spec.name](spec, unbiased=not feedback) for spec in specs], feedback=feedback)


__all__ = ["CLASSES", "REST", "Chain", "Guard", "Key", "get_chain", "shared_key", "update_key"]
