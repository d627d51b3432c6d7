"""What one silo measures of one model on its own rows, as counts that can be added over silos."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlm.errors import DataError, ModelError
from fedlm.evaluation.choice import encode_choices, judge_choices
from fedlm.evaluation.generation import score_generation
from fedlm.evaluation.scoring import grouped_nll
from fedlm.evaluation.written import score_written
from fedlm.messages import Fields
from fedlm.randomness import key
from fedlm.recipe.schema import EvaluationSpec
from fedlm.recipe.tasks import TASKS, WRITTEN
from fedlm.training.generation import context_length
from fedlm.training.sequences import Encoded
from fedlm.training.tasks import Task
from fedlm.training.tasks.base import Held


def measure(
    model: Any,
    tokenizer: Any,
    rows: Any,
    kind: str,
    task: Task,
    spec: EvaluationSpec,
    *,
    max_length: int,
    items: bool = False,
    packing: bool = True,
    skip: bool = False,
    reference: Callable[[], AbstractContextManager[None]] | None = None,
    reference_logps: Callable[[Sequence[Encoded]], NDArray[np.float64]] | None = None,
    states: Callable[[Sequence[Encoded]], NDArray[np.float32]] | None = None,
) -> Fields:
    """Measure a model on canonical examples; the result is plain JSON and holds no text.

    Args:
        rows: `datasets.Dataset` of canonical examples of one `kind`.
        kind: 'text', 'messages', 'preference', 'opinion' or 'choice'; only the last has the choice and generation
            metrics, and only messages have those of written answers.
        max_length: tokens at which rows are cut for the loss, which is that of the training task itself; a long
            document may be several sequences, which are added up.
        packing: False for models that cannot be packed (the recipe's `training.packing`).
        skip: a row that the chat template refuses has no loss, as the recipe's `malformed: skip` says.
        reference: inside, the model is the one that the run began with; for tasks that compare with it.
        reference_logps: log-probability of each sequence's targets under that model.
        states: the frozen model's mean state of each sequence, for tasks that learn from them.
        items: add each row's result under "items", in the order of the rows, for paired comparisons.

    Returns:
        {"examples", "loss_sum" (nats), "loss_tokens", "choice_correct", "choice_correct_norm", "choice_total",
        "generation_correct", "generation_parsed", "generation_total",
        "figures": {name: [sum, count]}} and, if asked, "items": {"nll", "tokens",
        "choice", "choice_norm", "generation",
        and each figure of written answers}, of those measured. Metrics that were not asked for count 0.

    The model's training flag and its gradients stay as they were; equal calls give equal results.

    Raises:
        DataError: a row is refused, and not skipped.
        ModelError: when the model gives a loss that is not finite.
    """
    rows = _subset(rows, spec.max_examples)
    if not TASKS[task.name].likelihood:
        known = (reference, reference_logps, states)
        held = Held(rows, model, tokenizer, max_length, spec.batch_tokens, packing, skip, *known)
        with _evaluating(model):
            found = task.measure(held)
        for total, _ in found.figures.values():
            _require_finite(np.array(total))
        figures = {name: list(pair) for name, pair in found.figures.items()}
        return {"examples": len(rows), "figures": figures, **({"items": found.items} if items else {})}
    result: Fields = {
        "examples": len(rows),
        "loss_sum": 0.0,
        "loss_tokens": 0,
        "choice_correct": 0,
        "choice_correct_norm": 0,
        "choice_total": 0,
        "generation_correct": 0,
        "generation_parsed": 0,
        "generation_total": 0,
        "figures": {},
    }
    detail: dict[str, list[Any]] = {}
    with _evaluating(model):
        wants_loss, wants_choice = "loss" in spec.metrics, "choice" in spec.metrics and kind == "choice"
        # Loss and choices of one row begin alike: scored together, the question is read once.
        context = context_length(model) if wants_choice else 0

        def pieces_of(row: Any) -> list[Encoded]:
            try:
                return task.pieces(dict(row), tokenizer, max_length)
            except DataError:
                if not skip:
                    raise
                return []

        pieces = [pieces_of(row) if wants_loss else [] for row in rows]
        choices = [encode_choices(row, tokenizer, task.name, context) if wants_choice else [] for row in rows]
        groups = [[*p, *c] for p, c in zip(pieces, choices, strict=True)]
        scored = grouped_nll(model, groups, batch_tokens=spec.batch_tokens, packing=packing)
        for nll, _ in scored:
            _require_finite(nll)
        if wants_loss:
            losses = [float(nll[: len(p)].sum()) for p, (nll, _) in zip(pieces, scored, strict=True)]
            tokens = [int(counts[: len(p)].sum()) for p, (_, counts) in zip(pieces, scored, strict=True)]
            result["loss_sum"], result["loss_tokens"] = math.fsum(losses), sum(tokens)
            detail["nll"], detail["tokens"] = losses, tokens
        if wants_choice:
            scores = judge_choices(rows, [-nll[len(p) :] for p, (nll, _) in zip(pieces, scored, strict=True)])
            result["choice_correct"] = int(scores.correct.sum())
            result["choice_correct_norm"] = int(scores.correct_norm.sum())
            result["choice_total"] = len(scores.correct)
            detail["choice"] = scores.correct.astype(int).tolist()
            detail["choice_norm"] = scores.correct_norm.astype(int).tolist()
        if "generation" in spec.metrics and kind == "choice":
            written = score_generation(
                model,
                tokenizer,
                rows,
                task.name,
                batch_tokens=spec.batch_tokens,
                max_new_tokens=spec.max_new_tokens,
            )
            result["generation_correct"] = int(written.correct.sum())
            result["generation_parsed"] = int(written.parsed.sum())
            result["generation_total"] = len(written.correct)
            detail["generation"] = written.correct.astype(int).tolist()
        wanted = [name for metric in spec.metrics for name in WRITTEN.get(metric, ())]
        if wanted and kind == "messages":
            scores_of = score_written(
                model, tokenizer, rows, wanted,
                batch_tokens=spec.batch_tokens, max_new_tokens=spec.max_new_tokens, skip=skip,
            )  # fmt: skip
            result["figures"] = {name: [math.fsum(values), len(values)] for name, values in scores_of.items()}
            detail |= scores_of
    if items:
        result["items"] = detail
    return result


def _subset(rows: Any, limit: int | None) -> Any:
    """At most `limit` rows, chosen by a hash of each row's content, in their own order: the same rows every time."""
    if limit is None or len(rows) <= limit:
        return rows
    ranks = np.array([key(0, "evaluation", content) for content in rows["hash"]])
    return rows.select(np.sort(np.argsort(ranks, kind="stable")[:limit]))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own flag is put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _require_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ModelError(
            "the model gives a loss that is not finite on held-out text",
            fix="lower training.lr, or start again from the last good checkpoint",
        )
