"""Personal data in rows: what is found, by published examples of each checksum, and that it is gone before anything."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from fedlm.data import redact
from fedlm.data.federated import load_data
from fedlm.data.redact import Redactor, is_card, is_dni, is_iban, is_ip, is_steuer_id
from fedlm.errors import MissingExtra, RecipeError
from fedlm.federation.silo.holdings import load_holdings
from fedlm.recipe.load import load_recipe, recipe_hash
from fedlm.recipe.redact import RedactSpec
from fedlm.recipe.schema import Recipe

NO_PHONE = ["email", "iban", "card", "ip", "url", "ssn", "steuer_id", "dni"]


def redacted(text: str, **spec: Any) -> str:
    return Redactor(RedactSpec(**{"kinds": NO_PHONE, **spec})).text(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("write to anna.smith+x@mail.example.org, or <b@c.de>.", "write to [EMAIL], or <[EMAIL]>."),
        ("mailto:j_d@example.co.uk?x", "mailto:[EMAIL]?x"),
        ("a@b, @home, user@localhost and 3@4.5 are none", "a@b, @home, user@localhost and 3@4.5 are none"),
        # ISO 13616's examples of Germany and the United Kingdom
        ("to DE89 3704 0044 0532 0130 00 AND MORE", "to [IBAN] AND MORE"),
        ("GB82WEST12345698765432; GB82 WEST 1234 5698 7654 33", "[IBAN]; GB82 WEST 1234 5698 7654 33"),
        ("card 4111 1111 1111 1111, 4111-1111-1111-1112", "card [CARD], 4111-1111-1111-1112"),
        ("4111 1111 1111 1111 7 and 4111-1111-1111-1111-22", "[CARD] 7 and [CARD]-22"),
        ("5555555555554444 and 378282246310005 and 20021002000000", "[CARD] and [CARD] and 20021002000000"),
        ("from [192.168.10.5] and 2001:db8::1 at 12:30:45", "from [[IP]] and [IP] at 12:30:45"),
        ("version 1.2.3.4.5, 999.1.1.1, 1.2.3 and ::", "version 1.2.3.4.5, 999.1.1.1, 1.2.3 and ::"),
        ("https://u:secret@host.example/p?q=1 https://host.example/p", "[URL] https://host.example/p"),
        ("078-05-1120, 000-12-3456, 666-12-3456, 900-12-3456", "[SSN], 000-12-3456, 666-12-3456, 900-12-3456"),
        ("123-00-4567 123-45-0000 12-34-5678", "123-00-4567 123-45-0000 12-34-5678"),
        ("86095742719, 47 036 892 816 and 65929970489", "[STEUER_ID], [STEUER_ID] and [STEUER_ID]"),
        ("86095742718 and 12345678901", "86095742718 and 12345678901"),
        ("DNI 12345678Z, 12345678A, NIE X1234567L, X1234567M", "DNI [DNI], 12345678A, NIE [DNI], X1234567M"),
        ("Ähnliches wie straße@x und ٣٤٥ ² bleibt", "Ähnliches wie straße@x und ٣٤٥ ² bleibt"),
        ("", ""),
    ],
)  # fmt: skip
def test_finds(text: str, wanted: str) -> None:
    assert redacted(text) == wanted


def test_checksums_catch_every_single_wrong_digit() -> None:
    """What mod 97, Luhn, mod 11,10 and the letter mod 23 promise."""
    for good, check in (
        ("DE89370400440532013000", is_iban),
        ("4111111111111111", is_card),
        ("86095742719", is_steuer_id),
        ("12345678Z", is_dni),
    ):
        assert check(good)
        for place, letter in enumerate(good):
            if letter.isdigit():
                for other in "0123456789":
                    bad = good[:place] + other + good[place + 1 :]
                    assert not check(bad) or other == letter or (check is is_card and place == 0), bad
    assert is_ip("127.0.0.1") and not is_ip("1.2.3.256")


def test_kinds_are_chosen_counted_and_numbered() -> None:
    made = Redactor(RedactSpec(kinds=["email"], numbered=True))
    row = {
        "messages": [
            {"role": "user", "content": "a@b.org wrote to c@d.org from 10.0.0.1"},
            {"role": "assistant", "content": "A@B.org"},
        ],
        "answer": 3,
    }
    found = made.example(row)
    assert [turn["content"] for turn in found["messages"]] == [
        "[EMAIL_1] wrote to [EMAIL_2] from 10.0.0.1",
        "[EMAIL_1]",
    ]
    assert found["answer"] == 3 and found["messages"][0]["role"] == "user"
    assert made.example({"text": "c@d.org"}) == {"text": "[EMAIL_1]"}
    assert made.counts == {"email": 4}
    assert Redactor(RedactSpec(kinds=[])).text("a@b.org") == "a@b.org"


@pytest.mark.parametrize("piece", ["1 ", "a@", "a.", "1-", "::", "aaaa:", "://", "DE89", "x", "+1", "a@b.cd ", "(0"])
def test_no_text_takes_long(piece: str) -> None:
    began = time.process_time()
    redacted(piece * (200_000 // len(piece)))
    assert time.process_time() - began < 5


def test_phones_by_their_countries_plans() -> None:
    pytest.importorskip("phonenumbers")
    text = "call +34 912 345 678, 912 345 678 or (650) 253-0000; 2002-08-22 12:00:00, 1234567, +34 123"
    known = {"kinds": ["phone"]}
    assert redacted(text, **known) == text.replace("+34 912 345 678", "[PHONE]")
    both = (
        text.replace("+34 912 345 678", "[PHONE]")
        .replace("912 345 678", "[PHONE]")
        .replace("(650) 253-0000", "[PHONE]")
    )
    assert redacted(text, **known, phone_regions=["ES", "US"]) == both
    assert redacted("card 4111 1111 1111 1111", kinds=["phone", "card"], phone_regions=["US"]) == "card [CARD]"


def test_without_the_library_phones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact.importlib.util, "find_spec", lambda _: None)
    Redactor(RedactSpec(kinds=NO_PHONE))
    with pytest.raises(MissingExtra, match=r"\[redact\]"):
        Redactor(RedactSpec())


# ------------------------------------------------------------------------------------------------ rows

CANARY = "secret.person@hospital.example"
RECIPE = """
name: r
model: {source: smollm2-135m-instruct}
data:
  sources: [{path: rows.jsonl, columns: {prompt: q, response: a, label: who}}]
  partition: {kind: iid, silos: 1}
  split: {validation: 0.3, test: 0.3}
  redact: {kinds: [email, card]}
training: {steps: 1}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDLM_CACHE", str(tmp_path / "cache"))
    with (tmp_path / "rows.jsonl").open("w") as rows:
        for number in range(40):
            row = {"q": f"question {number} of {CANARY}", "a": f"4111 1111 1111 1111 {number}", "who": CANARY}
            rows.write(json.dumps(row) + "\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def test_every_role_is_clean_and_so_is_the_cache(folder: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml")
    data = load_data(recipe, folder)
    silo = data.silo(data.names[0])
    for role in ("train", "validation", "test"):
        rows = getattr(silo, role)
        assert len(rows) > 0
        for row in rows:
            assert CANARY not in json.dumps(row) and "[EMAIL]" in row["messages"][0]["content"]
            assert row["messages"][1]["content"].startswith("[CARD]")
    assert data.redacted == {"email": 80, "card": 40}
    assert "secret" not in json.dumps(data.card(data.names[0])) and data.card(data.names[0])["labels"] == {
        "[EMAIL]": 40
    }
    for file in (folder / "cache").rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file
    again = load_data(recipe, folder)
    assert again.redacted == data.redacted and again.fingerprint == data.fingerprint


def test_other_settings_are_another_recipe_and_other_rows(folder: Path) -> None:
    one = load_recipe(folder / "recipe.yaml")
    two = load_recipe(folder / "recipe.yaml", ["data.redact.kinds=[email]"])
    none = load_recipe(folder / "recipe.yaml", ["data.redact=null"])
    assert len({recipe_hash(r) for r in (one, two, none)}) == 3
    assert len({load_data(r, folder).fingerprint for r in (one, two, none)}) == 3
    with pytest.raises(RecipeError, match=r"unknown value 'emial', did you mean 'email'"):
        load_recipe(folder / "recipe.yaml", ["data.redact.kinds=[emial]"])
    with pytest.raises(RecipeError, match="no country's code"):
        load_recipe(folder / "recipe.yaml", ["data.redact.phone_regions=[Spain]"])


@pytest.mark.parametrize(
    ("owner", "texts"),
    [
        ("", "question 0 of [EMAIL]"),
        ("redact: {kinds: [card]}\n", f"question 0 of {CANARY}"),
        ("redact: {kinds: []}\n", f"question 0 of {CANARY}"),
        ("redact: {kinds: [email], numbered: true}\n", "question 0 of [EMAIL_1]"),
    ],
)
def test_the_owners_word_counts(folder: Path, owner: str, texts: str, caplog: pytest.LogCaptureFixture) -> None:
    for kind, more in (
        ("sources: [{path: rows.jsonl, columns: {prompt: q, response: a, label: who}}]\n", {"at_silos": True}),
        (f"share_of_recipe: true\nbase: {json.dumps(str(folder))}\n", None),
    ):
        (folder / "data.yaml").write_text(kind + owner)
        recipe = load_recipe(folder / "recipe.yaml")
        if more:
            whole = recipe.model_dump(mode="json")
            whole["data"] |= {**more, "sources": [], "partition": None}
            recipe = Recipe.model_validate(whole)
        name = "silo-0000" if more is None else "hospital-a"
        text = load_holdings(folder / "data.yaml")
        with caplog.at_level(logging.INFO, "fedlm.silo"):
            caplog.clear()
            data = text.load(text.recipe_for(recipe, name), name)
        contents = [
            row["messages"][0]["content"]
            for role in ("train", "validation", "test")
            for row in getattr(data.silo(name), role)
        ]
        assert texts in contents and len(contents) == 40
        # the owner's log has counts, and nothing of the text
        assert ("personal data replaced" in caplog.text) == bool(data.redacted) and CANARY not in caplog.text
        assert "redacted" not in json.dumps(data.card(name))
