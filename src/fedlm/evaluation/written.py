"""Written answers: the model writes the last assistant turn of a conversation, and it is compared with the row's own.

ROUGE (Lin, 2004) is that of the `rouge-score` library: F-measure, words stemmed, L over the whole text. It reads Latin
letters and digits only, so text in another script has no words for it and scores 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from fedlm.errors import DataError
from fedlm.evaluation.generation import generate_greedy
from fedlm.models.chat import FIX, MessagesRefused, render
from fedlm.training.answers import exact_match, f1


def score_written(
    model: Any,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    figures: Sequence[str],
    *,
    batch_tokens: int,
    max_new_tokens: int,
    skip: bool = False,
) -> dict[str, list[float]]:
    """By figure, the score of every row's answer, between 0 and 1.

    Args:
        rows: with `messages` and, where there are several right answers, `answers`; of a row without an assistant turn
            nothing is asked.
        figures: of 'exact_match', 'f1', 'rouge1', 'rouge2', 'rougeL'.
        skip: nothing is asked of a row that the chat template refuses, either.

    Raises:
        DataError: the chat template refuses a row, and it is not skipped.
    """
    prompts: list[list[int]] = []
    references: list[list[str]] = []
    for row in rows:
        turns = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=None)
        if last is None:
            continue
        try:
            prompt = render(tokenizer, turns[:last], True)
        except MessagesRefused as error:
            if not skip:
                raise DataError(error.what, where=row.get("row"), fix=FIX) from None
            continue
        prompts.append(list(tokenizer.encode(prompt, add_special_tokens=False)))
        references.append([turns[last]["content"], *(row.get("answers") or [])])
    written = generate_greedy(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=max_new_tokens)
    scored = [written_scores(text, right, figures) for text, right in zip(written, references, strict=True)]
    return {figure: [scores[figure] for scores in scored] for figure in figures}


def written_scores(answer: str, references: Sequence[str], figures: Sequence[str]) -> dict[str, float]:
    """Each figure of one answer, with the best of the references."""
    scores: dict[str, float] = {}
    rouge = [figure for figure in figures if figure.startswith("rouge")]
    if rouge:
        best = _rouge().score_multi(references, answer)
        scores |= {figure: float(best[figure].fmeasure) for figure in rouge}
    if "exact_match" in figures:
        scores["exact_match"] = exact_match(answer, references)
    if "f1" in figures:
        scores["f1"] = f1(answer, references)
    return scores


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
