from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from fedlm.errors import ModelError
from fedlm.evaluation.generation import generate_greedy, score_generation
from fedlm.training.answers import parse_answer
from tests.evaluation.plain import plain_greedy

CHOICES = ["sport", "business news", "business", "politics"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sport", 0),
        (" Sport.\n", 0),
        ("business", 2),
        ("business news", 1),
        ("Business news, clearly", 1),
        ("politics\nBecause the text names a minister.", 3),
        ("B", 1),
        ("(C)", 2),
        ("D. politics", 3),
        ("The answer is B.", 1),
        ("Answer: (A)", 0),
        ("I think this is about politics", 3),
        ("The topic is sport, not politics", None),
        ("sports", None),
        ("Z", None),
        ("", None),
        ("no idea at all", None),
        ("A minister resigned", None),
        ("The answer is a politics story.", 3),
        ("The answer is Z, that is: politics", 3),
        ("Answer: B\nbecause", 1),
    ],
)
def test_parse(text: str, expected: int | None) -> None:
    assert parse_answer(text, CHOICES) == expected


def test_choices_that_read_alike_are_never_guessed() -> None:
    assert parse_answer("yes", ["Yes.", "yes"]) is None


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batches_with_a_cache_equal_one_at_a_time_without(tiny: tuple[Any, Any], batch_tokens: int) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer.encode("the bank lent money to the school " * k + "for") for k in (1, 3, 2, 5, 1)]
    prompts[4] = prompts[4][:2]
    texts = generate_greedy(model, tokenizer, prompts, batch_tokens=batch_tokens, max_new_tokens=12)
    for prompt, text in zip(prompts, texts, strict=True):
        truth = plain_greedy(model, prompt, [tokenizer.eos_token_id], 12)
        assert text == tokenizer.decode(truth, skip_special_tokens=True)


def test_a_row_that_has_ended_stays_ended(tiny: tuple[Any, Any], monkeypatch: Any) -> None:
    """With a frequent token declared an end, texts stop there, in batches as alone."""
    model, tokenizer = tiny
    prompts = [tokenizer.encode("the bank lent money to the school " * k) for k in (1, 2, 3)]
    free = [plain_greedy(model, p, [], 10) for p in prompts]
    stops = [free[0][3], free[1][6]]
    monkeypatch.setattr("fedlm.training.generation._stop_tokens", lambda *_: stops)
    texts = generate_greedy(model, tokenizer, prompts, batch_tokens=10_000, max_new_tokens=10)
    truth = [plain_greedy(model, p, stops, 10) for p in prompts]
    assert len({len(t) for t in truth}) > 1, "rows must end at different places, or the test shows nothing"
    assert texts == [tokenizer.decode(t, skip_special_tokens=True) for t in truth]


def test_scores_count_what_was_parsed(tiny: tuple[Any, Any], questions: Dataset, monkeypatch: Any) -> None:
    model, tokenizer = tiny
    replies = [row["choices"][row["answer"]] if i % 3 else "??" for i, row in enumerate(questions)]
    monkeypatch.setattr("fedlm.evaluation.generation.generate_greedy", lambda *_a, **_k: replies)
    scores = score_generation(model, tokenizer, questions, "instruct", batch_tokens=500, max_new_tokens=4)
    assert scores.parsed.sum() == scores.correct.sum() == 16


def test_no_room_for_a_prompt_is_an_error(tiny: tuple[Any, Any]) -> None:
    with pytest.raises(ModelError, match="no room"):
        generate_greedy(*tiny, [[1]], batch_tokens=100, max_new_tokens=256)
