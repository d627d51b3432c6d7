"""What a silo computes of a batch: the gradients of all that is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedlm.messages import Tensors
from fedlm.models.adapters import trainable
from fedlm.training.sequences import Encoded


def gradients(model: Any, batch: Sequence[Sequence[int]]) -> Tensors:
    """Of the mean loss over every token but each sequence's first, the sequences alike in length."""
    model.zero_grad(set_to_none=True)
    ids = torch.tensor([list(s) for s in batch])
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None}


def windows(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    """Real text cut into pieces of this many tokens that do not overlap."""
    cut = [tokenizer.encode(text) for text in texts]
    return [ids[i : i + length] for ids in cut for i in range(0, len(ids) - length + 1, length)]


def encoded(ids: Sequence[int]) -> Encoded:
    """Every token but the first is a target."""
    return Encoded(np.asarray(ids, np.int32), np.arange(len(ids)) > 0)


def overfitted(
    model: Any, rows: Sequence[Encoded], steps: int, rate: float = 5e-3, *, only_adapter: bool = False
) -> Any:
    """The model after steps of AdamW on all these rows at once, alike in length."""
    model.train()
    if not only_adapter:
        model.requires_grad_(True)
    ids = torch.from_numpy(np.stack([row.ids for row in rows]).astype(np.int64))
    optimiser = torch.optim.AdamW(trainable(model).values(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
    return model.eval()
