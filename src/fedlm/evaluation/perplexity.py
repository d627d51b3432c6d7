"""Loss over a task's target tokens: what training minimises, measured on text the model has not seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fedlm.training.forward import sequence_nll
from fedlm.training.tasks import Task


def target_nll(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    task: Task,
    *,
    max_length: int,
    batch_tokens: int,
    packing: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Summed NLL of the target tokens (nats) and their number, per row; both zero for a row without targets.

    Rows are encoded by the training task itself, at most `max_length` tokens a sequence, so this is the loss that
    training sees. A long document may be several sequences; they are added up.
    """
    pieces = [task.pieces(dict(row), tokenizer, max_length) for row in rows]
    owners = np.repeat(np.arange(len(pieces)), [len(found) for found in pieces])
    sums, counts = sequence_nll(model, [p for found in pieces for p in found], batch_tokens, packing=packing)
    nll, tokens = np.zeros(len(pieces)), np.zeros(len(pieces), dtype=np.int64)
    np.add.at(nll, owners, sums)
    np.add.at(tokens, owners, counts)
    return nll, tokens
