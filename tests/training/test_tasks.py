"""What becomes a target, and what is cut, dropped or refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlm.errors import DataError, ModelError, RecipeError
from fedlm.training.encode import TokenSet, encode_all
from fedlm.training.sequences import Example
from fedlm.training.tasks import get_task
from tests.training.helpers import sequence


def said(tokenizer: Any, row: dict[str, Any], max_length: int = 256) -> str:
    item = get_task("instruct").pieces(row, tokenizer, max_length)[0]
    assert item is not None
    return str(tokenizer.decode(item.ids[item.loss]))


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": c} for r, c in turns], "row": "file.jsonl:3"}


def test_only_the_assistant_and_its_end_of_turn_are_targets(tokenizer: Any) -> None:
    row = chat(("system", "be kind"), ("user", "why"), ("assistant", "so it is"), ("user", "oh"), ("assistant", "yes"))
    assert said(tokenizer, row) == "so it is<|im_end|>yes<|im_end|>"


def test_tokens_are_the_rendered_conversation(tokenizer: Any) -> None:
    row = chat(("user", "why"), ("assistant", "so it is"))
    item = get_task("instruct").pieces(row, tokenizer, 256)[0]
    assert tokenizer.decode(item.ids) == "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\nso it is<|im_end|>"


def test_text_that_looks_like_the_template_is_still_masked_right(tokenizer: Any) -> None:
    row = chat(("user", "say <|im_start|>assistant\nno<|im_end|>"), ("assistant", "yes"))
    assert said(tokenizer, row) == "yes<|im_end|>"


def test_choice_rows_are_asked_and_answered_by_text(tokenizer: Any) -> None:
    assert said(tokenizer, {"question": "which?", "choices": ["bank", "school"], "answer": 1}) == "school<|im_end|>"


def test_cut_rows_are_counted_and_rows_without_target_dropped(tokenizer: Any) -> None:
    long_answer = chat(("user", "why"), ("assistant", "so it is " * 30))
    long_question = chat(("user", "why " * 60), ("assistant", "so"))
    found = encode_all([long_answer, long_question], get_task("instruct"), tokenizer, 40)
    assert (len(found), found.dropped, found.cut) == (1, 1, 1)
    assert len(found[0]) == 40
    with pytest.raises(DataError, match="none of the 1 rows keeps a target token within 40"):
        encode_all([long_question], get_task("instruct"), tokenizer, 40)


def test_unstable_template_is_refused_without_quoting_text(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", forgetful)
    row = chat(("user", "why"), ("assistant", "secret"), ("user", "oh"), ("assistant", "yes"))
    with pytest.raises(DataError, match=r"file.jsonl:3: .*turn 1") as caught:
        get_task("instruct").pieces(row, tokenizer, 256)[0]
    assert "secret" not in str(caught.value)


def test_refusing_template_and_missing_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no secret please') }}")
    row = chat(("user", "secret"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"^file.jsonl:3: .*: no secret please \(roles: user, assistant\)"):
        get_task("instruct").pieces(row, tokenizer, 256)[0]
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception(messages[0].content) }}")
    with pytest.raises(DataError, match="refuses these messages: TemplateError") as caught:
        get_task("instruct").pieces(row, tokenizer, 256)[0]
    assert "secret" not in str(caught.value)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ModelError, match="no chat template"):
        get_task("instruct").pieces(row, tokenizer, 256)[0]


ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_refused_rows_are_named_or_skipped(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", ALTERNATING)
    task = get_task("instruct")
    good = chat(("user", "why"), ("assistant", "so"))
    bad = chat(("assistant", "so"), ("user", "why"), ("assistant", "yes"))
    with pytest.raises(DataError, match=r"^file.jsonl:3: .*roles must alternate"):
        encode_all([good, bad, good], task, tokenizer, 64)
    found = encode_all([good, bad, good], task, tokenizer, 64, skip=True)
    assert (len(found), found.dropped, found.cut) == (2, 1, 0)
    with pytest.raises(DataError, match=r"^file.jsonl:3: .*roles must alternate"):
        encode_all([bad, bad], task, tokenizer, 64, skip=True)


@pytest.mark.parametrize(
    ("template", "words"),
    [("{% for m in messages %}", "does not parse"), ("{{ ''.__class__.__mro__ }}", "Python's internals")],
)
def test_a_broken_template_is_no_rows_fault(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str, words: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ModelError, match=words):
        encode_all([chat(("user", "why"), ("assistant", "so"))], get_task("instruct"), tokenizer, 64, skip=True)


def test_rows_of_another_kind_are_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"^f\.csv:2: .*task: pretrain"):
        get_task("instruct").pieces({"text": "plain", "row": "f.csv:2"}, tokenizer, 256)
    with pytest.raises(DataError, match=r"^f\.csv:2: .*needs rows with `text`"):
        get_task("pretrain").pieces({"messages": [], "row": "f.csv:2"}, tokenizer, 256)
    with pytest.raises(RecipeError, match="did you mean 'instruct'"):
        get_task("instuct")


@pytest.mark.parametrize("max_length", [2, 7, 1000])
def test_pretraining_loses_no_token_of_a_long_document(tokenizer: Any, max_length: int) -> None:
    text = "the patient was given a dose of medicine and the bank lent money"
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    pieces = get_task("pretrain").pieces({"text": text}, tokenizer, max_length)
    assert all(len(p) <= max_length for p in pieces)
    assert [int(t) for p in pieces for t in p.ids[p.loss]] == ids[1:]
    for before, after in itertools.pairwise(pieces):
        assert before.ids[-1] == after.ids[0]


def test_token_set_round_trips_through_memory_maps(tokenizer: Any, tmp_path: Path) -> None:
    rows = [chat(("user", "why"), ("assistant", w)) for w in ("so", "because it is", "no")]
    made = encode_all(rows, get_task("instruct"), tokenizer, 64)
    made.save(tmp_path / "tokens")
    read = TokenSet.load(tmp_path / "tokens")
    assert isinstance(read.ids, np.memmap)
    assert len(read) == 3 and [len(s) for s in read] == made.lengths.tolist()
    for a, b in zip(made, read, strict=True):
        assert (a.sequences[0].ids == b.sequences[0].ids).all() and (a.sequences[0].loss == b.sequences[0].loss).all()
    assert len(made[-1]) == len(made[2]) and len(made[:2]) == 2


def test_examples_of_several_sequences_keep_them_together_with_their_facts(tmp_path: Path) -> None:
    def pair(i: int) -> Example:
        return Example((sequence((1, 3 + i), answer=2), sequence((5, 4), answer=1)), {"label": float(i % 2)})

    made = TokenSet.of([pair(i) for i in range(5)], dropped=2)
    made.save(tmp_path / "pairs")
    read = TokenSet.load(tmp_path / "pairs")
    assert len(made) == len(read) == 5 and read.lengths.tolist() == [7 + i for i in range(5)]
    for i, example in enumerate(read):
        assert [s.ids.tolist() for s in example.sequences] == [s.ids.tolist() for s in pair(i).sequences]
        assert example.facts == {"label": float(i % 2)} and example.targets == 3
