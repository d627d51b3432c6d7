"""Column expressions: 'doc.query' reaches into nested records, '{text:.400}\\n\\nTopic?' is a template over columns.

What a template may hold is said, and checked, in `fedlm.recipe.expressions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fedlm.errors import DataError, nearest
from fedlm.recipe.expressions import is_template, parse_template

Row = Mapping[str, Any]


class MalformedRowError(Exception):
    """This row cannot become an example. The message is a phrase without any of the row's text."""


class UnknownColumnError(MalformedRowError):
    """The row has no such column; the message lists those that exist."""


def column_names(row: Row, depth: int = 3) -> list[str]:
    """The row's columns, nested ones dotted."""
    names = []
    for name, value in row.items():
        names.append(str(name))
        if depth > 1 and isinstance(value, Mapping):
            names += [f"{name}.{inner}" for inner in column_names(value, depth - 1)]
    return names


def look_up(row: Row, name: str) -> Any:
    """The value of a column; dots reach into nested records, and with a number from 0 into lists, unless a column has
    the dotted name itself.

    Raises:
        UnknownColumnError: there is no such column.
    """
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
            continue
        if not isinstance(value, Mapping) or part not in value:
            names = column_names(row)
            hint = nearest(name, names)
            if not hint.startswith("valid names"):
                hint = f"{hint.rstrip('?')}; columns: {', '.join(names[:40])}"
            raise UnknownColumnError(f"there is no column '{name}' ({hint})")
        value = value[part]
    return value


def as_text(value: Any, name: str) -> str:
    """A scalar as text. Raises MalformedRowError for empty values, NaN, infinities, lists and records."""
    if isinstance(value, str):
        if value.strip():
            return value
    elif isinstance(value, bool | int | float):
        _check_finite(value, name)
        return str(value)
    elif value is not None:
        raise MalformedRowError(f"column '{name}' holds a {type(value).__name__}, not text")
    raise MalformedRowError(f"column '{name}' is empty")


def as_share(value: Any, name: str) -> float:
    """A number that is not negative. Raises MalformedRowError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedRowError(f"column '{name}' holds no number")
    _check_finite(value, name)
    if value < 0:
        raise MalformedRowError(f"column '{name}' is negative")
    return float(value)


def _check_finite(value: Any, name: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedRowError(f"column '{name}' holds no finite number (NaN or infinity)")


def compile_text(expression: str) -> Callable[[Row], str]:
    """A function from a row to text, for a column name or a template.

    Raises:
        DataError: a template that is malformed or uses more than column names and plain formats.
    """
    if not is_template(expression):
        return lambda row: as_text(look_up(row, expression), expression)
    try:
        parts = parse_template(expression)
    except ValueError as fault:
        where = f"template of {len(expression)} characters '{expression[:60]}'"
        raise DataError(str(fault), where=where) from None

    def fill(row: Row) -> str:
        out = []
        for literal, field, spec in parts:
            out.append(literal)
            if field is not None:
                out.append(_format(look_up(row, field), field, spec))
        text = "".join(out)
        if not text.strip():
            raise MalformedRowError("the template gives an empty text")
        return text

    return fill


def _format(value: Any, name: str, spec: str) -> str:
    if not spec.endswith(("d", "f")):
        return format(as_text(value, name), spec)
    _check_finite(value, name)
    try:
        return format(value, spec)
    except (TypeError, ValueError, OverflowError):
        raise MalformedRowError(f"column '{name}' is not a number that fits the format '{spec}'") from None
