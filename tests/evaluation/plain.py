"""The reference: one sequence at a time, no padding, no packing, straight from the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def plain_nll(model: Any, ids: Sequence[int], targets: Sequence[bool]) -> float:
    """-sum over target tokens of log p(token | tokens before it), in nats."""
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0].double().log_softmax(-1)
    return -sum(float(logits[i - 1, ids[i]]) for i in range(1, len(ids)) if targets[i])


@torch.no_grad()
def plain_greedy(model: Any, ids: Sequence[int], stops: Sequence[int], steps: int) -> list[int]:
    """Greedy continuation, the whole text read anew for every token."""
    written: list[int] = []
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([[*ids, *written]]), use_cache=False).logits[0, -1]
        written.append(int(logits.argmax()))
        if written[-1] in stops:
            break
    return written
