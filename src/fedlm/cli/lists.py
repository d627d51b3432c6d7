"""Options that hold several values with commas between them."""

from __future__ import annotations

from fedlm.errors import RunError


def listed(text: str) -> list[str]:
    """The parts, without the blanks around them and without empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]


def seeds_in(text: str, option: str) -> list[int]:
    """Different seeds, in their order.

    Raises:
        RunError: not whole numbers of at least 0.
    """
    parts = listed(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise RunError("seeds are whole numbers with commas between them", where=option, fix=f"e.g. {option} 0,1,2")
    return list(dict.fromkeys(int(part) for part in parts))
