"""The form of column expressions: a column's name or, with braces, a template such as '{text:.400}\\n\\nTopic?'.

Templates are a restricted form of Python's: fields are column names, there is no attribute or index access, no
conversion, and a format may only cut, pad or round. So a recipe from a stranger can neither run code nor fill memory.
"""

from __future__ import annotations

import re
import string

_SPEC = re.compile(r"[<>^]?[0-9]{0,4}(?:\.[0-9]{1,6})?[sdf]?")
_FIELD = re.compile(r"[^\[\](){}!:]+")


def is_template(text: str) -> bool:
    """Whether an expression is a template, not a column's name."""
    return "{" in text or "}" in text


def parse_template(text: str) -> list[tuple[str, str | None, str]]:
    """A template's parts: (literal text, then the column or None, its format).

    Raises:
        ValueError: not a template, or one that uses more than column names and plain formats; says how to mend it.
    """
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as fault:
        raise ValueError(f"is not a template: {fault} (write {{{{ and }}}} for braces that are text)") from None
    parts = []
    for literal, field, spec, conversion in parsed:
        if field == "":
            raise ValueError("has empty braces: name a column in them, such as {text} or {text:.400}")
        if field is not None and (conversion is not None or not _FIELD.fullmatch(field)):
            raise ValueError(
                f"the template's '{field}' is not a plain column name: write {{column}} or {{column:.400}}"
            )
        if not _SPEC.fullmatch(spec or ""):
            raise ValueError(f"the template's format '{spec}' is not accepted: formats look like .400, >12 or .2f")
        parts.append((literal, field, spec or ""))
    return parts
