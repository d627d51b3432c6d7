"""A silo's part in the search for a prompt: how well each candidate fits its rows, in sums over rows.

The verb 'score'. A request carries candidates and names a role; which rows count follows from the recipe and the round.
The reply is a function of the silo's rows and the request alone, so a repeat is answered alike. A row adds at most 1 to
the right ones, and between `FLOOR` and 0 to the log-likelihood: what leaves is bounded by the number of rows, and could
be masked or noised (`release`).

Request, tensors: `text`, JSON (see `pack_text`): a list of candidates, the empty one for none. Fields: `role`. Reply,
tensors: `sums` fp64 [candidates, 2] (log-likelihood in nats, right ones), `counts` int64 [candidates], rows. Fields:
`kind` of the rows, 'choice' or 'messages'.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedlm.errors import DataError
from fedlm.evaluation.choice import encode_after
from fedlm.evaluation.scoring import grouped_nll
from fedlm.federation.memory import peak_rss
from fedlm.federation.silo.text import unpack_text
from fedlm.messages import Fields, Request, Tensors
from fedlm.models.chat import render
from fedlm.randomness import numpy_generator
from fedlm.recipe.prompting import MOST_CANDIDATES, PROMPT_CHARACTERS
from fedlm.training.generation import context_length
from fedlm.training.sequences import Encoded

if TYPE_CHECKING:
    from fedlm.algorithms.base import Place
    from fedlm.federation.silo.workbench import Workbench

ROLES = ("train", "validation", "test")

KINDS = ("choice", "messages")
"""Rows that have a prompt and an answer."""

FLOOR = -20.0
"""Nats: the least that a row adds to a log-likelihood."""


def score(bench: Workbench, place: Place, request: Request) -> tuple[Tensors, Fields]:
    """The reply to a request (see above).

    Raises:
        DataError: the recipe searches no prompt, or the request is not of this form or too large.
    """
    started, spec = time.monotonic(), bench.recipe.search
    if spec is None:
        raise DataError("the recipe searches no prompt, so none is scored", where="search")
    candidates, role = read_candidates(request.tensors), request.fields.get("role")
    if role not in ROLES:
        raise DataError("a request to score prompts names none of the roles train, validation and test")
    data = bench.silo_data(place.silo)
    if data.kind not in KINDS:
        raise DataError("prompts are scored on conversations or questions with choices, and this silo has neither")
    rows = _rows(bench, getattr(data, role), role, place)
    groups = [_encoded(bench, row, data.kind, prompt) for prompt in candidates for row in rows]
    with bench.as_reference():
        scored = grouped_nll(
            bench.model, groups, batch_tokens=bench.recipe.evaluation.batch_tokens,
            packing=bench.recipe.training.packing,
        )  # fmt: skip
    sums = torch.zeros(len(candidates), 2, dtype=torch.float64)
    for index, (nll, tokens) in enumerate(scored):
        row, candidate = rows[index % len(rows)], index // len(rows)
        sums[candidate] += torch.tensor(judged(row, -nll, int(tokens.sum())), dtype=torch.float64)
    counts = torch.full((len(candidates),), len(rows), dtype=torch.int64)
    sums, counts = release(sums, counts, place)
    fields = {"kind": data.kind, "seconds": time.monotonic() - started, "peak_rss": peak_rss()}
    return {"sums": sums, "counts": counts}, fields


def release(sums: torch.Tensor, counts: torch.Tensor, place: Place) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    """What leaves the silo in the place of its sums [candidates, 2] and counts [candidates]: these themselves.

    All that `score` sends passes through here, so that noise or masks have one place to be put.
    """
    return sums, counts


def judged(row: Mapping[str, Any], logps: np.ndarray, tokens: int) -> tuple[float, float]:
    """(log-likelihood, right) of a row.

    With choices, from their log-likelihoods [choices]: that of the right one among them, and whether it is the largest
    (the first of equals). Else that of the answers per token, and 0.

    Raises:
        DataError: the model gives a likelihood that is no number.
    """
    if np.isnan(logps).any():
        raise DataError("the model gives a row a likelihood that is no number, so prompts cannot be compared")
    if "choices" not in row:
        return max(FLOOR, float(logps.sum()) / max(1, tokens)), 0.0
    answer = int(row["answer"])
    return max(FLOOR, float(among(logps)[answer])), float(int(np.argmax(logps)) == answer)


def among(logps: np.ndarray) -> np.ndarray:
    """Log-probabilities [choices] among the choices, from their log-likelihoods."""
    moved = logps - logps.max()
    shares: np.ndarray = moved - np.log(np.exp(moved).sum())
    return shares


def read_candidates(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The prompts of a request.

    Raises:
        DataError: they are none, too many or too long.
    """
    found = unpack_text(tensors, MOST_CANDIDATES * (PROMPT_CHARACTERS * 6 + 4))
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise DataError("a request to score prompts holds no list of prompts")
    if len(found) > MOST_CANDIDATES or any(len(text) > PROMPT_CHARACTERS for text in found):
        raise DataError(f"more than {MOST_CANDIDATES} prompts, or one above {PROMPT_CHARACTERS} characters, to score")
    return found


def with_prompt(messages: Sequence[Mapping[str, str]], prompt: str, place: str) -> list[dict[str, str]]:
    """A conversation with a prompt: as its system turn, before the one that it has, or before its first user's words.

    Without a prompt, the conversation itself.
    """
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages]
    if not prompt:
        return turns
    wanted = "system" if place == "system" else "user"
    if place == "system" and turns[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *turns]
    at = next((i for i, turn in enumerate(turns) if turn["role"] == wanted), 0)
    turns[at]["content"] = f"{prompt}\n\n{turns[at]['content']}"
    return turns


def _encoded(bench: Workbench, row: Mapping[str, Any], kind: str, prompt: str) -> list[Encoded]:
    spec, limit = bench.recipe.search, context_length(bench.model)
    assert spec is not None
    if kind == "choice":
        turns = with_prompt([{"role": "user", "content": row["question"]}], prompt, spec.place)
        return encode_after(render(bench.tokenizer, turns, True), row["choices"], bench.tokenizer, limit)
    turns = with_prompt(row["messages"], prompt, spec.place)
    return bench.task.pieces({**row, "messages": turns}, bench.tokenizer, limit)


def _rows(bench: Workbench, rows: Any, role: str, place: Place) -> list[dict[str, Any]]:
    """The rows that count: of training rows as many as the recipe says, drawn for this round; else its held-out ones.

    Raises:
        DataError: there are none.
    """
    recipe = bench.recipe
    assert recipe.search is not None
    if len(rows) == 0:
        raise DataError(f"this silo has no {role} rows to score prompts on")
    most = recipe.search.rows if role == "train" else recipe.evaluation.max_examples or len(rows)
    drawn = (role, place.round) if role == "train" else (role,)
    chosen = numpy_generator(recipe.seed, "prompt rows", place.silo, *drawn).permutation(len(rows))[:most]
    return [dict(row) for row in rows.select(np.sort(chosen))]
