"""Numbers as people read them: bytes, seconds, counts, shares, and the names of metrics."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from fedlm.recipe.tasks import FIGURES

MISSING = "–"

METRICS: dict[str, tuple[str, bool]] = {
    "accuracy": ("accuracy", True),
    "generation_accuracy": ("accuracy of generated answers", True),
    "loss": ("loss", False),
    "perplexity": ("perplexity", False),
    "accuracy_norm": ("accuracy by length-normalised likelihood", True),
    "parse_rate": ("generated answers that could be read", True),
    **{key: (figure.words, figure.higher) for key, figure in FIGURES.items()},
}
"""Key of a summarised metric -> (its name in words, whether higher is better), the most telling first."""


def number(value: Any, digits: int = 3) -> str:
    """A measured value with about `digits` significant digits; a dash where there is none.

    >>> number(0.123456), number(15234.0), number(None)
    ('0.123', '15,234', '–')
    """
    if not is_number(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(float(value))
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:.{min(decimals, digits)}f}"


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether this is a finite number (booleans are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def metric(key: str, value: Any) -> str:
    """A metric's value: shares as per cent, the rest as a number."""
    if not is_number(value):
        return MISSING
    if is_share(key):
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if key == "loss" else number(value)


def is_share(key: str) -> bool:
    """Whether a metric of this key lies between 0 and 1 and is shown as per cent."""
    if key in FIGURES:
        return FIGURES[key].proportion or FIGURES[key].unit
    return "accuracy" in key or key.endswith("rate")


def metric_name(key: str) -> str:
    return METRICS[key][0] if key in METRICS else key.replace("_", " ")


def higher_is_better(key: str) -> bool:
    return METRICS[key][1] if key in METRICS else is_share(key)


def size(value: Any) -> str:
    """Bytes with a decimal unit.

    >>> size(269_000_000), size(512)
    ('269 MB', '512 B')
    """
    if not is_number(value):
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value = value / 1000
    return f"{value:.1f} TB"


def duration(seconds: Any) -> str:
    """A length of time.

    >>> duration(0.4), duration(75), duration(7300)
    ('0.4 s', '1 min 15 s', '2 h 01 min')
    """
    if not is_number(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(value: Any) -> str:
    """A whole number with thousands separators."""
    return f"{round(value):,}" if is_number(value) else MISSING


def plural(n: int, singular: str) -> str:
    """`1 silo`, `4 silos`."""
    return f"{n:,} {singular}" + ("" if n == 1 else "s")
