"""Scores of written answers against reference libraries, and through `measure` against generation by hand."""

from __future__ import annotations

import importlib
import random
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from fedlm.errors import DataError
from fedlm.evaluation import measure
from fedlm.evaluation.written import score_written, written_scores
from fedlm.models.chat import render
from fedlm.recipe.schema import EvaluationSpec
from fedlm.training.answers import exact_match, f1, normalised
from fedlm.training.tasks import get_task
from tests.evaluation.plain import plain_greedy

ALL = ["exact_match", "f1", "rouge1", "rouge2", "rougeL"]
WORDS = ["the", "A", "bank", "lent", "money,", "to", "U.S.", "school", "(an)", "23", "ÉTÉ", "theatre"]


@pytest.mark.parametrize(
    ("answer", "references", "right"),
    [
        ("The Bank.", ["bank"], 1),
        ("a bank lent  money", ["Bank lent money!"], 1),
        ("theatre", ["the atre"], 0),
        ("bank", ["money", "the bank"], 1),
        ("", ["bank"], 0),
        ("U.S.", ["us"], 1),
        ("23-year", ["23 year"], 0),
    ],
)
def test_exact_match_by_squads_definition(answer: str, references: list[str], right: int) -> None:
    assert exact_match(answer, references) == right


def test_f1_by_hand() -> None:
    # bag {bank, lent, money} and {bank, lent, school, money}: 3 in common, precision 1, recall 3/4
    assert f1("the bank lent money", ["A bank lent school money"]) == pytest.approx(2 * 0.75 / 1.75)
    assert f1("money money", ["money"]) == pytest.approx(2 * 0.5 / 1.5)  # a repeated word counts once
    assert f1("bank", ["school", "the bank"]) == 1  # the best reference
    assert f1("the", ["a"]) == 1 and f1("", ["bank"]) == 0 and f1("bank", ["the"]) == 0


def _reference_f1(monkeypatch: pytest.MonkeyPatch) -> Any:
    """lm-eval's F1 of question answering; the module's other metrics need libraries that are not used here."""
    pytest.importorskip("lm_eval")
    for name, member in (("jieba", "cut"), ("fuzzywuzzy", "fuzz"), ("rouge", "Rouge")):
        stand_in = types.ModuleType(name)
        setattr(stand_in, member, object)
        monkeypatch.setitem(sys.modules, name, stand_in)
    # the package's own import reaches for all of lm-eval
    import lm_eval

    path = Path(str(lm_eval.__file__)).parent / "tasks" / "longbench" / "metrics.py"
    spec = importlib.util.spec_from_file_location("longbench_metrics", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_f1_equals_lm_evals(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = _reference_f1(monkeypatch)
    draw = random.Random(0)
    for _ in range(500):
        ours, right = (" ".join(draw.choices(WORDS, k=draw.randint(1, 7))) for _ in range(2))
        assert normalised(ours) == reference.normalize_answer(ours)
        if normalised(ours) and normalised(right):  # without a word it gives 0, SQuAD 2.0 whether both have none
            assert f1(ours, [right]) == pytest.approx(reference.qa_f1_score(ours, right), abs=1e-12)


def test_rouge_is_the_librarys_with_the_best_reference() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    draw = random.Random(1)
    for _ in range(50):
        answer, *references = (" ".join(draw.choices(WORDS, k=draw.randint(1, 9))) for _ in range(3))
        scores = written_scores(answer, references, ALL)
        for figure in ("rouge1", "rouge2", "rougeL"):
            best = max(scorer.score(reference, answer)[figure].fmeasure for reference in references)
            assert scores[figure] == pytest.approx(best, abs=1e-12)
    # by hand: 'the cat sat' and 'the cat ran' share 2 of 3 words, 1 of 2 pairs, and a subsequence of 2
    by_hand = written_scores("the cat sat", ["the cat ran"], ALL)
    assert [by_hand[f] for f in ("rouge1", "rouge2", "rougeL")] == pytest.approx([2 / 3, 1 / 2, 2 / 3])


def conversations() -> Dataset:
    rows = []
    for i in range(7):
        turns = [{"role": "system", "content": "the bank"}] if i % 2 else []
        for k in range(1 + i % 3):
            turns += [
                {"role": "user", "content": f"{WORDS[i]} patient {k}?"},
                {"role": "assistant", "content": f"dose {WORDS[k]}"},
            ]
        further = ["medicine"] if i == 3 else []
        rows.append({"messages": turns, "answers": further, "row": f"rows:{i}", "hash": f"{i:064x}"})
    rows[5]["messages"] += [{"role": "user", "content": "and a question that nobody has answered"}]
    return Dataset.from_list(rows)


def test_measure_writes_the_last_assistant_turn_and_counts(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    listed, texts = conversations().to_list(), []
    for i, row in enumerate(listed):
        last = max(k for k, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
        prompt = tokenizer.encode(render(tokenizer, row["messages"][:last], True), add_special_tokens=False)
        ids = plain_greedy(model, prompt, [tokenizer.eos_token_id], 8)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
        if i in (1, 5):  # the model is right
            row["messages"][last]["content"] = texts[i]
        if i == 2:
            row["answers"] = ["medicine", texts[i]]
    rows = Dataset.from_list(listed)
    spec = EvaluationSpec(metrics=["loss", "rouge", "exact_match", "f1"], max_new_tokens=8, batch_tokens=64)
    found = measure(model, tokenizer, rows, "messages", get_task("instruct"), spec, max_length=128, items=True)
    assert set(found["figures"]) == set(ALL)
    for i, row in enumerate(rows):
        last = max(k for k, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
        truth = written_scores(texts[i], [row["messages"][last]["content"], *row["answers"]], ALL)
        for figure in ALL:
            assert found["items"][figure][i] == pytest.approx(truth[figure], abs=1e-12)
    assert found["figures"]["exact_match"] == [3.0, 7]
    for figure in ALL:
        total, count = found["figures"][figure]
        assert count == len(rows) and total == pytest.approx(np.sum(found["items"][figure]))


def test_rows_that_the_template_refuses(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", strict + tokenizer.chat_template)
    few: dict[str, Any] = {"batch_tokens": 64, "max_new_tokens": 2}
    with pytest.raises(DataError, match="refuses") as refused:
        score_written(model, tokenizer, conversations(), ["f1"], **few)
    assert "patient" not in str(refused.value)
    kept = score_written(model, tokenizer, conversations(), ["f1"], skip=True, **few)
    assert len(kept["f1"]) == 4
