"""Rows become examples: column expressions, chats, choices; and what is said of rows that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlm.data.columns import MalformedRowError, compile_text, look_up
from fedlm.data.examples import content_hash, right_choice
from fedlm.data.federated import FederatedData
from fedlm.errors import DataError

Load = Callable[..., FederatedData]
WHOLE = {"validation": 0, "test": 0}


def test_look_up() -> None:
    row = {"doc": {"query": "q", "deep": {"x": 1}}, "a.b": 2}
    assert (look_up(row, "doc.query"), look_up(row, "doc.deep.x"), look_up(row, "a.b")) == ("q", 1, 2)
    with pytest.raises(MalformedRowError, match=r"no column 'doc.qery' \(did you mean 'doc.query'"):
        look_up(row, "doc.qery")
    with pytest.raises(MalformedRowError, match=r"valid names: a\.b, doc, doc\.deep, doc\.deep\.x, doc\.query"):
        look_up(row, "zzzzzz")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text:.4}|{n}", "long|3"),
        ("{{literal}} {doc.x}", "{literal} deep"),
        ("{n:>5d}", "    3"),
        ("{n:.2f}", "3.00"),
        ("plain {text}", "plain longer"),
    ],
)
def test_templates(template: str, expected: str) -> None:
    assert compile_text(template)({"text": "longer", "n": 3, "doc": {"x": "deep"}}) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{text[0]}",
        "{text.__class__!r}",
        "{text!s}",
        "{}",
        "{text:{n}}",
        "{text:999999999}",
        "{text:.99999999}",
        "{text",
        "}",
    ],
)
def test_templates_refused(template: str) -> None:
    with pytest.raises(DataError, match="template"):
        compile_text(template)


def test_templates_reach_no_attributes() -> None:
    with pytest.raises(MalformedRowError, match="no column"):
        compile_text("{text.__class__}")({"text": "x"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_never_become_text(value: float) -> None:
    for expression in ("x", "{x}", "{x:.2f}", "{x:>5}"):
        with pytest.raises(MalformedRowError, match="'x' holds no finite number"):
            compile_text(expression)({"x": value})


def test_nan_in_a_file_is_a_malformed_row(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"p": float("nan"), "r": "yes"}, {"p": 1.5, "r": "no"}])
    source = {"path": "rows.jsonl", "columns": {"prompt": "p", "response": "r"}}
    with pytest.raises(DataError, match=r"rows\.jsonl:1: column 'p' holds no finite number"):
        load([source])
    assert load([source], malformed="skip", split=WHOLE).skipped == {"malformed": 1}


@pytest.mark.parametrize("value", ["", "  \n", None, [], {}])
def test_empty_values_are_malformed(value: Any) -> None:
    for expression in ("text", "{text} tail"):
        with pytest.raises(MalformedRowError, match="'text'"):
            compile_text(expression)({"text": value})


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        (0, 0),
        (2.0, 2),
        ("Blue ", 1),
        ("RED.", 0),
        ("c", 2),
        ("(B)", 1),
        ("B.", 1),
        ("2", 2),
        ("B. blue", 1),
        (True, None),
        (3, None),
        (-1, None),
        ("E", None),
        ("purple", None),
        ("", None),
        (None, None),
        (0.5, None),
        (["red"], None),
    ],
)
def test_right_choice(answer: Any, index: int | None) -> None:
    choices = ["red", "blue", "green"]
    if index is None:
        with pytest.raises(MalformedRowError):
            right_choice(answer, choices)
    else:
        assert right_choice(answer, choices) == index


def test_right_choice_prefers_text_and_refuses_doubt() -> None:
    assert right_choice("B", ["C", "A", "B"]) == 2
    assert right_choice(True, ["yes", "no", "maybe"]) == 0
    assert right_choice(False, ["True", "False"]) == 1
    with pytest.raises(MalformedRowError, match="several"):
        right_choice("same", ["Same", "same", "other"])


@pytest.mark.parametrize(
    ("answer", "labels", "right"),
    [
        ("1", ["1", "2", "3", "4"], 0),
        (1, [1, 2, 3, 4], 0),
        (4.0, ["1", "2", "3", "4"], 3),
        ("C", ["A", "B", "C", "D"], 2),
        ("b", ["C", "B", "A", "D"], 1),
        ("A", ["D", "C", "B", "A"], 3),
        ("grey", ["1", "2", "3", "4"], 3),
        (2, ["A", "B", "C", "D"], 2),
        ("1", ["1", "2"], 1),
        ("1", None, 1),
    ],
)
def test_records_with_labels_of_their_own(
    load: Load, jsonl: Callable[..., Path], answer: Any, labels: list[Any] | None, right: int
) -> None:
    """As in ARC, where some answer keys are numbers from 1: the record's labels say what an answer means."""
    choices = {"text": ["red", "green", "blue", "grey"], "label": labels}
    jsonl([{"q": "Q1?", "choices": choices, "answerKey": answer}])
    for column in ("choices", "choices.text"):
        source = {"path": "rows.jsonl", "columns": {"question": "q", "choices": column, "answer": "answerKey"}}
        row = load([source], split=WHOLE).pooled().train[0]
        assert (row["choices"], row["answer"]) == (choices["text"], right)


@pytest.mark.parametrize(("answer", "labels"), [("0", ["1", "2"]), (0, ["1", "2"]), ("A", ["A", "A"])])
def test_labels_that_leave_doubt_are_refused(answer: Any, labels: list[str]) -> None:
    with pytest.raises(MalformedRowError, match="label"):
        right_choice(answer, ["red", "green"], labels)


def test_choices_in_three_ways(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"q": "which?", "list": ["x", "y"], "a": "x", "b": "y", "gold": "y", "json": '["x", "y"]'}])
    for choices in ("list", "json", ["{a}", "{b}"], ["x", "{b}"], ["x", "y"]):
        columns = {"question": "q", "choices": choices, "answer": "gold"}
        row = load([{"path": "rows.jsonl", "columns": columns}], split=WHOLE).pooled().train[0]
        assert (row["choices"], row["answer"], row["label"]) == (["x", "y"], 1, "y")


def test_chats(load: Load, jsonl: Callable[..., Path]) -> None:
    expected = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "a"))]
    jsonl(
        [
            {"chat": expected},
            {"chat": [{"from": f, "value": v} for f, v in (("system", "s"), ("human", "u"), ("gpt", "a"))]},
            {"chat": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in expected]},
        ]
    )
    data = load([{"path": "rows.jsonl", "columns": {"messages": "chat"}}], split=WHOLE)
    assert data.kind == "messages"
    assert data.pooled().train["messages"][:] == [expected] * 3
    assert data.duplicates == 2


def test_prompt_and_response_are_a_chat(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"p": "hello", "r": "world"}])
    row = load([{"path": "rows.jsonl", "columns": {"prompt": "{p}!", "response": "r"}}], split=WHOLE).pooled().train[0]
    assert row["messages"] == [{"role": "user", "content": "hello!"}, {"role": "assistant", "content": "world"}]


def test_system_turns_pairs_and_further_answers(load: Load, jsonl: Callable[..., Path]) -> None:
    pairs = [{"question": "who?", "answer": "a cat"}, {"question": "where?", "answer": "here"}]
    jsonl([{"story": "a cat is here", "talk": pairs, "right": ["here", "there", "here"], "r": [["x"], "y"]}])
    turns = [("system", "Story: a cat is here"), ("user", "who?"), ("assistant", "a cat"), ("user", "where?")]
    expected = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "here")]]
    told = {"system": "Story: {story}", "answers": "right"}
    row = load([{"path": "rows.jsonl", "columns": {"messages": "talk", **told}}], split=WHOLE).pooled().train[0]
    assert (row["messages"], row["answers"]) == (expected, ["here", "there"])
    columns = {"prompt": "talk.1.question", "response": "r.1", **told}
    row = load([{"path": "rows.jsonl", "columns": columns}], split=WHOLE).pooled().train[0]
    assert [m["content"] for m in row["messages"]] == ["Story: a cat is here", "where?", "y"]
    for column in ("r", "story", "talk.5.question"):
        with pytest.raises(DataError):
            load([{"path": "rows.jsonl", "columns": {**columns, "answers": column}}], split=WHOLE)


def test_preferences(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"p": "q", "c": "good", "r": "bad"}, {"p": "q", "c": "same", "r": "same"}])
    columns = {"prompt": "p", "chosen": "c", "rejected": "r"}
    data = load([{"path": "rows.jsonl", "columns": columns}], split=WHOLE, malformed="skip")
    assert data.kind == "preference"
    row = data.pooled().train[0]
    assert (row["prompt"], row["chosen"], row["rejected"], data.skipped["malformed"]) == ("q", "good", "bad", 1)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"c": "same thing", "r": " same  thing\n"}, "equal"),
        ({"c": "  "}, "column 'c' is empty"),
        ({"r": None}, "column 'r' is empty"),
        ({"talk": []}, "empty list of messages"),
        ({"talk": [{"role": "assistant", "content": "SECRETWORD"}]}, "nothing is left to answer"),
    ],
)
def test_preferences_after_a_conversation(
    load: Load, jsonl: Callable[..., Path], bad: dict[str, Any], reason: str
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "r"}]
    good = {"talk": turns, "c": "good", "r": "bad"}
    jsonl([good, {**good, **bad}])
    sources = [{"path": "rows.jsonl", "columns": {"messages": "talk", "chosen": "c", "rejected": "r"}}]
    row = load(sources, split=WHOLE, malformed="skip").pooled().train[0]
    assert (row["messages"], row["prompt"], row["chosen"]) == (turns, None, "good")
    with pytest.raises(DataError, match=reason) as caught:
        load(sources)
    assert "rows.jsonl:2" in str(caught.value) and "SECRETWORD" not in str(caught.value)


def test_judged_answers(load: Load, jsonl: Callable[..., Path]) -> None:
    said = [(True, True), ("no", False), (1, True), (0.0, False), ("TRUE", True)]
    jsonl([{"p": f"q{i}", "r": "answer", "good": value} for i, (value, _) in enumerate(said)])
    columns = {"prompt": "p", "response": "r", "desirable": "good"}
    data = load([{"path": "rows.jsonl", "columns": columns}], split=WHOLE)
    assert data.kind == "judged"
    found = {row["prompt"]: row["desirable"] for row in data.pooled().train}
    assert found == {f"q{i}": wanted for i, (_, wanted) in enumerate(said)}
    jsonl([{"p": "q", "r": "a", "good": "maybe"}], "other.jsonl")
    with pytest.raises(DataError, match="'good' is neither true nor false"):
        load([{"path": "other.jsonl", "columns": columns}])


def test_opinions(load: Load, jsonl: Callable[..., Path]) -> None:
    """Shares or counts, one for each choice; their proportions are kept."""
    columns = {"question": "q", "choices": "o", "shares": "n"}
    jsonl([{"q": "why?", "o": ["a", "b", "c"], "n": [6, 0, 2]}, {"q": "how?", "o": ["a", "b"], "n": "[0.5, 0.5]"}])
    data = load([{"path": "rows.jsonl", "columns": columns}], split=WHOLE)
    assert data.kind == "opinion"
    found = {row["question"]: (row["choices"], row["shares"]) for row in data.pooled().train}
    assert found == {"why?": (["a", "b", "c"], [0.75, 0.0, 0.25]), "how?": (["a", "b"], [0.5, 0.5])}
    for change, words in (
        ({"n": [1, 2]}, "'n' holds 2 numbers for 3 choices"),
        ({"n": [0, 0, 0]}, "do not add up to more than 0"),
        ({"n": [1, -1, 3]}, r"'n\[1\]' is negative"),
        ({"n": [1, "two", 3]}, r"'n\[1\]' holds no number"),
        ({"n": [1, True, 3]}, r"'n\[1\]' holds no number"),
        ({"n": 3}, "'n' is not a list of numbers"),
        ({"o": ["a", "b", "a "]}, "two of the choices are equal"),
        ({"o": ["a"], "n": [1]}, "fewer than two choices"),
        ({"o": ["a", " ", "c"]}, "is empty"),
    ):
        jsonl([{"q": "why?", "o": ["a", "b", "c"], "n": [6, 0, 2]} | change], "other.jsonl")
        with pytest.raises(DataError, match=words):
            load([{"path": "other.jsonl", "columns": columns}])


BAD_CHATS: list[tuple[Any, str]] = [
    ([], "empty list"),
    ("text", "not a list"),
    ([{"role": "user", "content": " "}], "message 1 of 'chat' is empty"),
    (
        [{"role": "user", "content": "x"}, {"role": "hacker", "content": "SECRETWORD"}],
        "message 2 of 'chat' has an unknown role",
    ),
    ([{"role": "user"}], "neither role and content"),
    (["SECRETWORD"], "not a record"),
]


@pytest.mark.parametrize(("chat", "message"), BAD_CHATS)
def test_bad_chats(load: Load, jsonl: Callable[..., Path], chat: Any, message: str) -> None:
    jsonl([{"chat": chat}])
    with pytest.raises(DataError, match=message) as caught:
        load([{"path": "rows.jsonl", "columns": {"messages": "chat"}}])
    assert "rows.jsonl:1" in str(caught.value)
    assert "SECRETWORD" not in str(caught.value)


def test_answer_not_among_the_choices(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"q": "which?", "a": "x"}, {"q": "which?", "a": "SECRETWORD"}])
    columns = {"question": "q", "choices": ["x", "y"], "answer": "a"}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the answer is not among the choices") as caught:
        load([{"path": "rows.jsonl", "columns": columns}])
    assert "SECRETWORD" not in str(caught.value)


def test_row_without_the_mapped_column(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": "fine", "id": 1}, {"txet": "SECRETWORD", "id": 2}])
    source = {"path": "rows.jsonl", "columns": {"text": "text"}}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: there is no column 'text' \(did you mean 'txet'") as caught:
        load([source])
    assert "SECRETWORD" not in str(caught.value)
    assert load([source], malformed="skip", split=WHOLE).skipped == {"malformed": 1}
    with pytest.raises(
        DataError, match=r"all 2 rows are malformed, the first at rows\.jsonl:1: there is no column 'x'"
    ):
        load([{"path": "rows.jsonl", "columns": {"text": "x"}}], malformed="skip")


def test_where_unique_and_subset(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl(
        [
            {"doc": {"id": i // 2}, "text": f"row {i}", "lang": "en" if i % 4 < 2 else "de", "ok": True}
            for i in range(40)
        ]
    )
    source = {
        "path": "rows.jsonl",
        "columns": {"text": "text"},
        "unique_by": "doc.id",
        "where": {"lang": "en", "ok": True},
    }
    rows = load([source], split=WHOLE).pooled().train["text"][:]
    assert rows == [f"row {i}" for i in range(0, 40, 4)]
    some = load([{**source, "max_rows": 4}], split=WHOLE).pooled().train["text"][:]
    assert len(some) == 4
    assert set(some) < set(rows)
    assert some == load([{**source, "max_rows": 4}], split=WHOLE).pooled().train["text"][:]
    assert some != load([{**source, "max_rows": 4}], split=WHOLE, seed=1).pooled().train["text"][:]
    both = load([{**source, "where": {"lang": ["en", "de"]}}], split=WHOLE).pooled().train
    assert len(both) == 20
    with pytest.raises(DataError, match=r"no rows.*where"):
        load([{**source, "where": {"lang": "fr"}}])
    with pytest.raises(DataError, match="no column 'language'"):
        load([{**source, "where": {"language": "en"}}])


def test_max_rows_follows_content_and_seed_not_place(load: Load, jsonl: Callable[..., Path]) -> None:
    rows = [{"text": f"row {i}"} for i in range(40)]
    jsonl(rows, "a.jsonl")
    jsonl(rows[::-1], "b.jsonl")

    def subset(path: str, seed: int) -> set[str]:
        source = {"path": path, "columns": {"text": "text"}, "max_rows": 10}
        return set(load([source], split=WHOLE, seed=seed).pooled().train["text"][:])

    assert len(subset("a.jsonl", 0)) == 10
    assert subset("a.jsonl", 0) == subset("b.jsonl", 0)
    assert subset("a.jsonl", 0) != subset("a.jsonl", 1)


def test_csv_values_compare_as_written(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,n,flag\none,1,true\ntwo,2,false\n")
    for where in ({"n": 1}, {"flag": True}):
        data = load([{"path": "a.csv", "columns": {"text": "text"}, "where": where}], split=WHOLE)
        assert data.pooled().train["text"][:] == ["one"]


def test_content_hash_ignores_white_space_only() -> None:
    assert content_hash({"text": "a  b\n"}) == content_hash({"text": "a b"})
    assert content_hash({"text": "a b"}) != content_hash({"text": "ab"})
    assert content_hash({"text": r"a\nb"}) != content_hash({"text": "a\nb"})
    first = {"question": "q", "choices": ["x", "y"], "answer": 0}
    assert content_hash(first) != content_hash({**first, "answer": 1})


def test_mixed_forms_are_refused(load: Load, jsonl: Callable[..., Path]) -> None:
    jsonl([{"text": "x", "p": "p", "r": "r"}])
    sources = [{"path": "rows.jsonl", "columns": c} for c in ({"text": "text"}, {"prompt": "p", "response": "r"})]
    with pytest.raises(DataError, match="same form"):
        load(sources)
    with pytest.raises(DataError, match="map exactly one of"):
        load([{"path": "rows.jsonl", "columns": {"text": "text", "prompt": "p"}}])
