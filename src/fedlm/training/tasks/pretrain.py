"""Pre-training: every token but a document's first is a target."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedlm.errors import DataError
from fedlm.training.sequences import Encoded
from fedlm.training.tasks.base import Task


class Pretrain(Task):
    """Plain language modelling over `text` rows.

    A document is its tokens and an end-of-sequence token. A document longer than `max_length` becomes several sequences
    that overlap by one token, so that each token but the document's first is a target exactly once and nothing is lost.
    """

    name = "pretrain"
    stored = True

    def pieces(self, row: dict[str, Any], tokenizer: Any, max_length: int) -> list[Encoded]:
        text = row.get("text")
        if not isinstance(text, str):
            raise DataError(
                "the task 'pretrain' needs rows with `text`",
                where=row.get("row"),
                fix="map `text` in `data.columns`",
            )
        if max_length < 2:
            raise DataError("`max_length` must be at least 2: a target needs a token before it")
        ids = tokenizer(text, add_special_tokens=True, truncation=False)["input_ids"]
        end = tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        flat = np.asarray(ids, dtype=np.int32)
        found = []
        for start in range(0, len(flat) - 1, max_length - 1):
            part = flat[start : start + max_length]
            loss = np.ones(len(part), dtype=np.bool_)
            loss[0] = False
            found.append(Encoded(part, loss))
        return found
