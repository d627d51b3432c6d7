"""Extraction: what an overfitted model writes of its rows, against what it writes of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedlm.attacks.extraction import extract, matched
from fedlm.data.redact import Redactor
from fedlm.errors import PrivacyError
from fedlm.recipe.redact import RedactSpec
from tests.attacks.silo import encoded, overfitted, windows


def test_an_overfitted_model_writes_its_rows_and_no_others(base: Any, tokenizer: Any, pages: list[str]) -> None:
    rows = windows(tokenizer, pages, 32)
    order = np.random.default_rng(1).permutation(len(rows))
    members, others = [rows[i] for i in order[:16]], [rows[i] for i in order[16:48]]
    before = extract(base, tokenizer, members, prefix=12, suffix=20)
    model = overfitted(base, [encoded(ids) for ids in members], steps=100)
    inside = extract(model, tokenizer, members, prefix=12, suffix=20)
    outside = extract(model, tokenizer, others, prefix=12, suffix=20)
    print(inside.share, outside.share)
    assert before.verbatim == 0 and (inside.texts, outside.texts) == (16, 32)
    assert inside.share > 0.7 and outside.verbatim == 0
    assert inside.interval[0] > outside.interval[1]


def test_matching_is_as_far_as_the_likeliest_tokens_go(base: Any, tokenizer: Any, pages: list[str]) -> None:
    """Greedy writing agrees with a text exactly as long as each token is the likeliest after those before it."""
    rows = windows(tokenizer, pages, 24)[:8]
    model = overfitted(base, [encoded(ids) for ids in rows], steps=15)
    found = extract(model, tokenizer, rows, prefix=8, suffix=16)
    with torch.no_grad():
        likeliest = model(input_ids=torch.tensor(rows), use_cache=False).logits[:, 7:-1].argmax(-1)
    expected = []
    for chosen, ids in zip(likeliest.tolist(), rows, strict=True):
        expected.append(next((i for i, (a, b) in enumerate(zip(chosen, ids[8:], strict=True)) if a != b), 16))
    assert found.matching == expected and 0 < sum(expected) < 8 * 16
    assert found.verbatim == sum(m == 16 for m in expected)


def test_personal_data_is_counted_where_the_suffix_alone_holds_it(base: Any, tokenizer: Any) -> None:
    """Made-up addresses: learnt ones are written, the last of which stands in the prompt already; others are not."""
    names = ["anna", "boris", "clara", "david", "emil", "fatima", "georg", "hanna"]
    texts = [f"the bank wrote to {name} and the answer came from {name}@school.example on the day" for name in names]
    known = [tokenizer.encode(text) for text in texts]
    length = min(len(ids) for ids in known)
    model = overfitted(base, [encoded(ids[:length]) for ids in known], steps=120)
    redactor = Redactor(RedactSpec(kinds=["email"]))
    tokens_to_name = len(tokenizer.encode("the bank wrote to boris"))
    asked = [ids[:length] for ids in known]
    found = extract(
        model, tokenizer, asked, prefix=tokens_to_name, suffix=length - tokens_to_name - 2, personal=redactor
    )
    print(found)
    assert found.present["email"] >= 6
    assert found.extracted["email"] >= 0.7 * found.present["email"]
    strangers = [tokenizer.encode(text.replace(name, name[::-1])) for text, name in zip(texts, names, strict=True)]
    others = [ids[: length + 1] for ids in strangers if len(ids) > length]
    if others:
        none = extract(model, tokenizer, others, prefix=3, suffix=length - 3, personal=redactor)
        assert none.verbatim == 0 and sum(none.extracted.values()) <= 1
    whole = extract(model, tokenizer, asked, prefix=length - 1, suffix=1, personal=redactor)
    assert whole.present.get("email", 0) <= 1  # it is in the prompt
    assert not redactor.counts


def test_short_texts_are_left_out_and_counted(base: Any, tokenizer: Any) -> None:
    found = extract(base, tokenizer, [[5, 6, 7], [5, 6, 7, 8]], prefix=2, suffix=2)
    assert (found.texts, found.short) == (1, 1)
    with pytest.raises(PrivacyError, match="none of 1 texts"):
        extract(base, tokenizer, [[5]], prefix=2, suffix=2)
    with pytest.raises(PrivacyError, match="ask nothing"):
        extract(base, tokenizer, [[5]], prefix=0, suffix=2)


def test_matched() -> None:
    assert [matched([1, 2, 3], t) for t in ([1, 2, 3], [1, 9, 3], [1, 2], [4])] == [3, 1, 2, 0]
