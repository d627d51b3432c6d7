"""Canonical examples: every source's rows, whatever their columns, in one of six forms.

    text        text
    messages    messages: list of {role, content}             (prompt + response maps here)
                answers: further right texts of the last assistant turn, often none
    preference  prompt, chosen, rejected                      (or messages in place of prompt: the turns before)
    judged      prompt, response, desirable: bool
    choice      question, choices: list of str, answer: index
    opinion     question, choices: list of str, shares: of a group, list of numbers that add up to 1

and always label, domain, hash (hex SHA-256 of the content), group (what `partition.by` names), row ('file:line') and
user (a hash of whose row it is; empty unless `privacy.unit: user` asks).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from fedlm.data.columns import MalformedRowError, Row, UnknownColumnError, as_share, as_text, compile_text, look_up
from fedlm.data.readers import RawRow
from fedlm.data.redact import Redactor
from fedlm.errors import DataError
from fedlm.recipe.expressions import is_template
from fedlm.recipe.schema import Columns, PartitionSpec, SourceSpec

_COMMON = [(name, pa.string()) for name in ("label", "domain", "hash", "group", "row", "user")]
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMAS = {
    "text": pa.schema([("text", pa.string()), *_COMMON]),
    "messages": pa.schema([("messages", pa.list_(_MESSAGE)), ("answers", pa.list_(pa.string())), *_COMMON]),
    "preference": pa.schema(
        [*((n, pa.string()) for n in ("prompt", "chosen", "rejected")), ("messages", pa.list_(_MESSAGE)), *_COMMON]
    ),
    "judged": pa.schema([("prompt", pa.string()), ("response", pa.string()), ("desirable", pa.bool_()), *_COMMON]),
    "choice": pa.schema(
        [("question", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64()), *_COMMON]
    ),
    "opinion": pa.schema(
        [("question", pa.string()), ("choices", pa.list_(pa.string())), ("shares", pa.list_(pa.float64())), *_COMMON]
    ),
}

_ROLES = {"system": "system", "user": "user", "human": "user", "prompter": "user", "assistant": "assistant"}
_ROLES |= {"gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant", "tool": "tool"}

_FORMS = [
    ({"messages"}, "messages"),
    ({"text"}, "text"),
    ({"prompt", "response"}, "messages"),
    ({"prompt", "chosen", "rejected"}, "preference"),
    ({"messages", "chosen", "rejected"}, "preference"),
    ({"prompt", "response", "desirable"}, "judged"),
    ({"question", "choices", "answer"}, "choice"),
    ({"question", "choices", "shares"}, "opinion"),
]

Example = dict[str, Any]


def kind_of(columns: Columns, where: str) -> str:
    """Which form the mapped columns make. Raises DataError for none, or a mixture of several."""
    given = set(columns.model_dump(exclude_none=True)) - {"label", "system", "answers", "user"}
    for names, kind in _FORMS:
        if given == names:
            return kind
    forms = ", ".join("+".join(sorted(names)) for names, _ in _FORMS)
    raise DataError(
        f"the columns {'+'.join(sorted(given)) or '(none)'} make no example",
        where=where,
        fix=f"map exactly one of {forms}",
    )


def has_categories(columns: Columns) -> bool:
    """Whether the label is a category that may be counted in the open, not an answer's private text."""
    literal = isinstance(columns.choices, list) and not any(is_template(c) for c in columns.choices)
    return columns.label is not None or literal


def map_rows(
    rows: Iterable[RawRow],
    source: SourceSpec,
    malformed: str,
    *,
    domain: str,
    partition: PartitionSpec | None = None,
    redactor: Redactor | None = None,
    user: str | None = None,
) -> Iterator[Example | str]:
    """Turn raw rows into examples, in order; a malformed row becomes its reason where the policy is to skip.

    Args:
        rows: what `sources.read_rows` gives.
        source: the mapping.
        malformed: 'fail' or 'skip'.
        domain: the source's name.
        partition: its `by` and `pattern` make the column `group`, which never leaves and stays as it is.
        redactor: replaces personal data in all else that a row says, before its content is hashed.
        user: column or template that says whose row it is; None for nobody's.

    Raises:
        DataError: a malformed row under 'fail', with file and row, without its text.
    """
    content = _CONTENT[kind_of(source.columns, source.path)](source.columns)
    further = None if source.columns.answers is None else _answers(source.columns.answers)
    labelled = None if source.columns.label is None else compile_text(source.columns.label)
    grouped = None if partition is None or partition.by is None else _group(partition.by, partition.pattern)
    owner = None if user is None else _user(user)
    for raw in rows:
        try:
            if raw.values is None:
                raise MalformedRowError(raw.fault)
            example = content(raw.values)
            more: Example = {}
            if "messages" in example:
                more["answers"] = further(raw.values) if further else []
            default = example["choices"][example["answer"]] if "answer" in example else ""
            more["label"] = labelled(raw.values) if labelled else default
            if redactor is not None:
                clean = redactor.example({**example, **more})
                example, more = {n: clean[n] for n in example}, {n: clean[n] for n in more}
            example["hash"] = content_hash(example)
            example |= {**more, "domain": domain, "row": raw.where}
            example["group"] = grouped(raw.values) if grouped else more["label"]
            example["user"] = owner(raw.values) if owner else ""
        except MalformedRowError as fault:
            if malformed == "fail":
                raise DataError(
                    str(fault), where=raw.where, fix="mend the row or the recipe's columns, or set data.malformed: skip"
                ) from None
            yield f"{raw.where}: {fault}"
        else:
            yield example


def content_hash(example: Mapping[str, Any]) -> str:
    """Hex SHA-256 of an example's content; white space is not content, so copies that differ in it count as equal."""
    text = json.dumps(_squeezed(example), sort_keys=True, ensure_ascii=False)
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise MalformedRowError("the text holds half a surrogate pair, which is no character") from None


def _squeezed(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return {key: _squeezed(item) for key, item in value.items()}
    return [_squeezed(item) for item in value] if isinstance(value, list) else value


def _group(by: str, pattern: str | None) -> Callable[[Row], str]:
    value = compile_text(by)
    if pattern is None:
        return value
    try:
        regex = re.compile(pattern)
    except re.error as fault:
        raise DataError(f"not a regular expression: {fault}", where="data.partition.pattern") from fault

    def first_group(row: Row) -> str:
        match = regex.search(value(row))
        found = match and (match[1] if regex.groups else match[0])
        if not found:
            raise MalformedRowError(f"column '{by}' does not match partition.pattern")
        return found

    return first_group


def _user(expression: str) -> Callable[[Row], str]:
    """Whose row it is, as a hash, so that nothing that shows a row shows a name. White space around it counts for
    nothing: it would make two users of one."""
    value = compile_text(expression)

    def hashed(row: Row) -> str:
        try:
            return hashlib.sha256(value(row).strip().encode()).hexdigest()
        except UnknownColumnError:
            raise
        except MalformedRowError as fault:
            raise MalformedRowError(f"the row does not say whose it is (privacy.unit: user): {fault}") from None

    return hashed


def _text(columns: Columns) -> Callable[[Row], Example]:
    text = compile_text(str(columns.text))
    return lambda row: {"text": text(row)}


def _turns(columns: Columns) -> Callable[[Row], Example]:
    prompt, response = compile_text(str(columns.prompt)), compile_text(str(columns.response))

    def build(row: Row) -> Example:
        user = {"role": "user", "content": prompt(row)}
        return {"messages": [user, {"role": "assistant", "content": response(row)}]}

    return build


def _as_list(value: Any, name: str, of: str) -> list[Any]:
    """A column's list, which CSV files write as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise MalformedRowError(f"column '{name}' holds text that is not a JSON list of {of}") from None
    if not isinstance(value, list):
        raise MalformedRowError(f"column '{name}' is not a list of {of}")
    return value


def _messages(columns: Columns) -> Callable[[Row], Example]:
    turns = _turns(columns) if columns.messages is None else _conversation(columns.messages)
    if columns.system is None:
        return turns
    system = compile_text(columns.system)
    return lambda row: {"messages": [{"role": "system", "content": system(row)}, *turns(row)["messages"]]}


def _conversation(name: str) -> Callable[[Row], Example]:
    def build(row: Row) -> Example:
        value = _as_list(look_up(row, name), name, "messages")
        if not value:
            raise MalformedRowError(f"column '{name}' is an empty list of messages")
        turns: list[dict[str, str]] = []
        for i, item in enumerate(value):
            where = f"message {i + 1} of '{name}'"
            for turn in _pair(item):
                turns.append(_message(turn, where))
        return {"messages": turns}

    return build


def _pair(item: Any) -> list[Any]:
    """The two turns of a {question, answer}; anything else is a turn by itself."""
    if isinstance(item, Mapping) and "question" in item and "answer" in item:
        return [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": item["answer"]}]
    return [item]


def _answers(name: str) -> Callable[[Row], list[str]]:
    def build(row: Row) -> list[str]:
        found = [as_text(text, f"{name}[{i}]") for i, text in enumerate(_as_list(look_up(row, name), name, "answers"))]
        return list(dict.fromkeys(found))

    return build


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise MalformedRowError(f"{where} is not a record")
    if "role" in item and "content" in item:
        role, content = item["role"], item["content"]
    elif "from" in item and "value" in item:
        role, content = item["from"], item["value"]
    else:
        raise MalformedRowError(f"{where} has neither role and content nor from and value nor question and answer")
    if isinstance(content, list) and all(isinstance(c, Mapping) and c.get("type") == "text" for c in content):
        content = "".join(str(c.get("text", "")) for c in content)
    if not isinstance(role, str) or role not in _ROLES:
        raise MalformedRowError(f"{where} has an unknown role (known: {', '.join(_ROLES)})")
    if not isinstance(content, str) or not content.strip():
        raise MalformedRowError(f"{where} is empty or not text")
    return {"role": _ROLES[role], "content": content}


def _preference(columns: Columns) -> Callable[[Row], Example]:
    names = ["chosen", "rejected"] if columns.messages is not None else ["prompt", "chosen", "rejected"]
    parts = {name: compile_text(str(getattr(columns, name))) for name in names}
    turns = _conversation(str(columns.messages))

    def build(row: Row) -> Example:
        example: Example = {name: text(row) for name, text in parts.items()}
        if columns.messages is not None:
            example |= turns(row)
            if example["messages"][-1]["role"] == "assistant":
                raise MalformedRowError("the messages end with the assistant's turn, so nothing is left to answer")
        if _squeezed(example["chosen"]) == _squeezed(example["rejected"]):
            raise MalformedRowError("the chosen and the rejected text are equal (white space aside)")
        return example

    return build


_VERDICTS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _judged(columns: Columns) -> Callable[[Row], Example]:
    prompt, response = compile_text(str(columns.prompt)), compile_text(str(columns.response))
    name = str(columns.desirable)
    verdict = compile_text(name)

    def build(row: Row) -> Example:
        said = verdict(row).strip().lower().removesuffix(".0")
        if said not in _VERDICTS:
            raise MalformedRowError(f"column '{name}' is neither true nor false")
        return {"prompt": prompt(row), "response": response(row), "desirable": _VERDICTS[said]}

    return build


def _choice(columns: Columns) -> Callable[[Row], Example]:
    question, answer = compile_text(str(columns.question)), str(columns.answer)
    read_answer = compile_text(answer) if is_template(answer) else lambda row: look_up(row, answer)
    options = _options(columns.choices)

    def build(row: Row) -> Example:
        choices, labels = options(row)
        if len(choices) < 2:
            raise MalformedRowError("there are fewer than two choices")
        right = right_choice(read_answer(row), choices, labels)
        return {"question": question(row), "choices": choices, "answer": right}

    return build


def _opinion(columns: Columns) -> Callable[[Row], Example]:
    question, name, options = compile_text(str(columns.question)), str(columns.shares), _options(columns.choices)

    def build(row: Row) -> Example:
        choices, _ = options(row)
        if len(choices) < 2:
            raise MalformedRowError("there are fewer than two choices")
        if len({_squeezed(choice) for choice in choices}) < len(choices):
            raise MalformedRowError("two of the choices are equal (white space aside)")
        values = _as_list(look_up(row, name), name, "numbers")
        shares = [as_share(value, f"{name}[{i}]") for i, value in enumerate(values)]
        if len(shares) != len(choices):
            raise MalformedRowError(f"column '{name}' holds {len(shares)} numbers for {len(choices)} choices")
        if not 0 < sum(shares) < float("inf"):
            raise MalformedRowError(f"the numbers of column '{name}' do not add up to more than 0")
        return {"question": question(row), "choices": choices, "shares": [share / sum(shares) for share in shares]}

    return build


def _options(choices: str | list[str] | None) -> Callable[[Row], tuple[list[str], list[str]]]:
    """A row's choices and, where a record names them as the ARC family on the hub does, their labels (else none)."""
    if isinstance(choices, list):
        parts = [compile_text(c) if is_template(c) else _literal(c) for c in choices]
        return lambda row: ([part(row) for part in parts], [])
    name = str(choices)

    def build(row: Row) -> tuple[list[str], list[str]]:
        value = look_up(row, name)
        record = look_up(row, name.removesuffix(".text")) if name.endswith(".text") and name not in row else value
        labels = None
        if isinstance(record, Mapping) and isinstance(record.get("text"), list):
            value, labels = record["text"], record.get("label")
        texts = [as_text(item, f"{name}[{i}]") for i, item in enumerate(_as_list(value, name, "choices"))]
        each = isinstance(labels, list) and len(labels) == len(texts)
        return texts, [str(label) for label in labels or []] if each else []

    return build


def _literal(text: str) -> Callable[[Row], str]:
    return lambda _: text


def right_choice(answer: Any, choices: list[str], labels: Sequence[str] = ()) -> int:
    """The index of the right choice.

    Where the data labels its choices, an answer that is one of the labels means that choice. Otherwise a number is an
    index from 0, unless the labels are numbers. Text is compared with the choices (case, white space, a final stop and
    a leading 'A. ' aside), then read as a letter A.. and last, if all digits, as such a number.

    Raises:
        MalformedRowError: the answer is not among the choices, or is equal to several.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if labels and isinstance(answer, str | int) and not isinstance(answer, bool):
        named = [i for i, label in enumerate(labels) if _normal(label) == _normal(str(answer))]
        if len(named) > 1:
            raise MalformedRowError("the answer's label is given to several choices")
        if named:
            return named[0]
        if str(answer).strip().isdecimal() and all(label.strip().isdecimal() for label in labels):
            raise MalformedRowError("the answer is not among the choices' labels")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise MalformedRowError(f"the answer's index is not between 0 and {len(choices) - 1}")
    normal = [_normal(c) for c in choices]
    if isinstance(answer, bool):
        words = ("yes", "true") if answer else ("no", "false")
        answer = next((w for w in words if w in normal), None)
    if not isinstance(answer, str) or not answer.strip():
        raise MalformedRowError("the answer is neither an index nor text")
    for text in (_normal(answer), _normal(re.sub(r"^\(?[A-Za-z][.):]\s+", "", answer.strip()))):
        hits = [i for i, c in enumerate(normal) if c == text]
        if len(hits) > 1:
            raise MalformedRowError("the answer's text is equal to several choices")
        if hits:
            return hits[0]
    letter = re.fullmatch(r"\(?([A-Za-z])[.):]?\)?", answer.strip())
    index = ord(letter[1].upper()) - ord("A") if letter else int(answer) if re.fullmatch(r"[0-9]{1,3}", answer) else -1
    if 0 <= index < len(choices):
        return index
    raise MalformedRowError("the answer is not among the choices")


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".")


_CONTENT: dict[str, Callable[[Columns], Callable[[Row], Example]]] = {
    "text": _text,
    "messages": _messages,
    "preference": _preference,
    "judged": _judged,
    "choice": _choice,
    "opinion": _opinion,
}
