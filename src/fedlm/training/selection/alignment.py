"""Instruction-response alignment, and training from easy to hard (FedDQC: Du et al., Findings of ACL 2025).

The score of a row is IRA = L(response) - L(response | instruction), L the mean negative log-likelihood of a response
token: how much the instruction helps to predict the response. A response that belongs to another instruction gains
nothing from it. Rows with high scores are easy: training goes through parts of the kept rows from high to low scores.

Unlike the paper, rows are scored once, by the model that the run begins with, and not anew before each part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlm.errors import DataError
from fedlm.models.chat import render
from fedlm.training.encode import TokenSet
from fedlm.training.forward import sequence_nll
from fedlm.training.sequences import Encoded


def alignment(
    model: Any, tokenizer: Any, tokens: TokenSet, *, batch_tokens: int, packing: bool = True
) -> NDArray[np.float64]:
    """The score of every example [n], in nats per response token; higher is better aligned."""
    opening = answer_opening(tokenizer)
    flat: list[Encoded] = []
    owner: list[int] = []
    sign: list[int] = []
    for i, example in enumerate(tokens):
        alone = [turn for sequence in example.sequences for turn in responses(sequence, opening)]
        flat += [*example.sequences, *alone]
        owner += [i] * (len(example.sequences) + len(alone))
        sign += [-1] * len(example.sequences) + [1] * len(alone)
    nll, counts = sequence_nll(model, flat, batch_tokens, packing=packing)
    given = np.array(sign) < 0
    gains = np.bincount(owner, nll * np.array(sign), len(tokens))
    return gains / np.bincount(np.array(owner)[given], counts[given], len(tokens))


def answer_opening(tokenizer: Any) -> list[int]:
    """What the chat template puts right before an answer; the token that opens a text where it puts nothing."""
    asked = [{"role": "user", "content": "?"}]
    plain, prompted = render(tokenizer, asked, False), render(tokenizer, asked, True)
    opening = prompted[len(plain) :] if prompted.startswith(plain) else ""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return list(tokenizer.encode(opening, add_special_tokens=False)) or [first]


def responses(sequence: Encoded, opening: list[int]) -> list[Encoded]:
    """Each run of targets as a sequence of its own: `opening`, then the targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sequence.loss, [False]]).astype(np.int8)))
    found = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        ids = np.concatenate([np.array(opening, np.int32), sequence.ids[start:end]])
        found.append(Encoded(ids, np.arange(len(ids)) >= len(opening)))
    return found


def best(scores: NDArray[np.float64], keep: float, threshold: float | None) -> NDArray[np.int64]:
    """Indices of the kept rows, in their own order: the share `keep` with the highest scores (the earlier of equals),
    of those at or above the threshold.

    Raises:
        DataError: none is.
    """
    order = np.argsort(-scores, kind="stable")[: max(1, round(keep * len(scores)))]
    kept = order if threshold is None else order[scores[order] >= threshold]
    if not len(kept):
        raise DataError(
            f"none of the {len(scores)} training rows has a score of {threshold} nats per token or more",
            where="data.selection.threshold",
            fix="lower it",
        )
    return np.sort(kept)


def stage(scores: NDArray[np.float64], stages: int, round_: int, rounds: int) -> NDArray[np.int64]:
    """Indices of the rows of this round's stage, in their own order; with fewer rows than stages, stages share rows."""
    number = min(round_ * stages // rounds, stages - 1)
    order = np.argsort(-scores, kind="stable")
    first = number * len(order) // stages
    end = max(first + 1, (number + 1) * len(order) // stages)
    return np.sort(order[first:end])
