"""A silo's part in learning in context: the coordinator's questions, answered from rows of its own shown before them.

The verb 'answer', after Fed-ICL (Wang et al., ICML 2025, arXiv 2506.07440). Before each question stand the silo's
training rows that are most like it, with their answers; from the second round on, before these, other questions with
the answers that the silos agreed on. What leaves are log-probabilities of the choices: no row, and no word. They are a
function of the silo's rows and the request alone, so a repeat is answered alike.

Likeness is the cosine between means of the model's own last hidden states, relative to the silo's mean. A row whose
question is the one that is asked is not shown. Where not everything fits into the model's context, what is least like
the question is left out first. Where the recipe asks for noise on text, all this is done with rows that were drawn anew
(`fedlm.federation.silo.perturbed`).

Request, tensors: `text`, JSON (see `pack_text`): {"queries": [[question, [choice, ...]], ...], "answers": [index,
...]}, no answers in the first round. Fields: `alone`: true to show nothing. Reply, tensors: `logps` fp32, all
questions' choices end to end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import DataError
from fedlm.evaluation.choice import encode_after
from fedlm.evaluation.scoring import grouped_nll
from fedlm.federation.memory import peak_rss
from fedlm.federation.silo.instructions import embeddings, most_alike
from fedlm.federation.silo.perturbed import perturbed_rows
from fedlm.federation.silo.scored import among
from fedlm.federation.silo.secret import secret_of
from fedlm.federation.silo.text import unpack_text
from fedlm.federation.silo.token_ledger import TokenBudget, charge
from fedlm.messages import Fields, Request, Tensors
from fedlm.models.chat import render
from fedlm.recipe.prompting import MOST_CHOICES, MOST_QUERIES, QUERY_CHARACTERS
from fedlm.training.generation import context_length
from fedlm.training.sequences import Encoded

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench

Query = tuple[str, list[str]]
"""A question and its choices."""

Shown = tuple[str, str]
"""A question and its answer."""


def answer(
    bench: Workbench, silo: str, request: Request, folder: Path, budget: TokenBudget, *, simulated: bool
) -> tuple[Tensors, Fields]:
    """The reply to a request (see above).

    Args:
        folder: the silo's private one, where the secret is that noise on its rows follows from, and the ledger of what
            that has cost.
        budget: what it may cost.
        simulated: a test key in place of a secret one.

    Raises:
        RefusedError: noise on the rows would cost more than the owner allows.
        DataError: the recipe asks no questions, the request is not of this form or too large, or the silo's rows are no
            questions with choices.
    """
    started = time.monotonic()
    if bench.recipe.in_context is None:
        raise DataError("the recipe asks no questions, so none is answered", where="in_context")
    queries, agreed = read_queries(request.tensors)
    with bench.as_reference():
        shown: list[list[Shown]] = [[] for _ in queries]
        if not request.fields.get("alone"):
            rows = _rows(bench, silo, request.run, folder, budget, simulated)
            shown = _shown(bench, silo, queries, agreed, rows)
        groups = [_encoded(bench, query, before) for query, before in zip(queries, shown, strict=True)]
        scored = grouped_nll(
            bench.model, groups, batch_tokens=bench.recipe.evaluation.batch_tokens,
            packing=bench.recipe.training.packing,
        )  # fmt: skip
    logps = np.concatenate([among(-nll) for nll, _ in scored])
    if not np.isfinite(logps).all():
        raise DataError("the model gives a choice a likelihood that is not finite")
    tensor = torch.from_numpy(logps).to(torch.float32)
    return {"logps": tensor}, {"seconds": time.monotonic() - started, "peak_rss": peak_rss()}


def read_queries(tensors: Mapping[str, torch.Tensor]) -> tuple[list[Query], list[int]]:
    """The questions of a request, and the answers that there are to them: none, or one for each.

    Raises:
        DataError: they are not of that form, too many or too long.
    """
    found = unpack_text(tensors, 64 * 2**20)
    queries, agreed = (found.get("queries"), found.get("answers")) if isinstance(found, dict) else (None, None)
    if not isinstance(queries, list) or not queries or not all(_is_query(query) for query in queries):
        raise DataError(
            f"a request to answer holds no questions of 2 to {MOST_CHOICES} choices, or one above {QUERY_CHARACTERS} "
            "characters"
        )
    if len(queries) > MOST_QUERIES:
        raise DataError(f"{len(queries)} questions to answer, above {MOST_QUERIES}")
    if not isinstance(agreed, list) or len(agreed) not in (0, len(queries)):
        raise DataError("a request to answer has not one answer for each question")
    for (_, choices), index in zip(queries, agreed, strict=False):
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(choices):
            raise DataError("a request to answer has an answer that is not among the choices")
    return [(question, choices) for question, choices in queries], agreed


def _is_query(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)):
        return False
    texts = [value[0], *value[1]]
    return 2 <= len(value[1]) <= MOST_CHOICES and all(isinstance(t, str) and len(t) <= QUERY_CHARACTERS for t in texts)


def _shown(
    bench: Workbench, silo: str, queries: Sequence[Query], agreed: Sequence[int], rows: Sequence[Shown]
) -> list[list[Shown]]:
    """What stands before each question, the least alike first: others' agreed answers, then the silo's own rows."""
    spec = bench.recipe.in_context
    assert spec is not None
    asked = _states(bench, [question for question, _ in queries])
    if silo not in bench.described:
        bench.described[silo] = _states(bench, [question for question, _ in rows])
    own = bench.described[silo]
    peers = [(question, choices[index]) for (question, choices), index in zip(queries, agreed, strict=False)]
    found = []
    near = most_alike(asked, own, len(rows))
    others = most_alike(asked, asked, len(queries)) if peers and spec.peers else [[] for _ in queries]
    for (question, _), by_row, by_peer in zip(queries, near, others, strict=True):
        first = [peers[i] for i in by_peer if peers[i][0] != question][: spec.peers]
        then = [rows[i] for i in by_row if rows[i][0] != question][: spec.examples]
        found.append([*reversed(first), *reversed(then)])
    return found


def _rows(bench: Workbench, silo: str, run: str, folder: Path, budget: TokenBudget, simulated: bool) -> list[Shown]:
    """Question and answer of each of the silo's rows, as they may be shown; found once, and paid for.

    Raises:
        DataError: they are no questions with choices.
        RefusedError, PrivacyError, RunError: see `fedlm.federation.silo.token_ledger.charge`.
    """
    spec, data = bench.recipe.in_context, bench.silo_data(silo)
    assert spec is not None
    if data.kind != "choice" or len(data.train) == 0:
        raise DataError("this silo has no training rows of questions with choices to show")
    if silo not in bench.shown:
        if spec.token_epsilon is None:
            found = [(str(row["question"]), str(row["choices"][int(row["answer"])])) for row in data.train]
        else:
            secret = secret_of(folder, (bench.recipe.seed, silo) if simulated else None)
            found, draw = perturbed_rows(bench, silo, secret, spec.token_epsilon)
            charge(folder, draw, run, budget)  # before anything is made of them
        bench.shown[silo] = found
    return bench.shown[silo]


def _states(bench: Workbench, texts: Sequence[str]) -> NDArray[np.float64]:
    limit, batch = context_length(bench.model), bench.recipe.evaluation.batch_tokens
    return embeddings(bench.model, bench.tokenizer, texts, limit, batch)


def _encoded(bench: Workbench, query: Query, shown: Sequence[Shown]) -> list[Encoded]:
    """One sequence per choice, after as much of what is shown as the context holds."""
    limit = context_length(bench.model)
    for begin in range(len(shown) + 1):
        turns: list[dict[str, str]] = []
        for question, answered in shown[begin:]:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]
        prompt = render(bench.tokenizer, [*turns, {"role": "user", "content": query[0]}], True)
        sequences = encode_after(prompt, query[1], bench.tokenizer, len(prompt.encode()) + QUERY_CHARACTERS * 4)
        if max(map(len, sequences)) <= limit + 1:  # the last token is predicted and never read
            return sequences
    return encode_after(prompt, query[1], bench.tokenizer, limit)
