"""Messages that no honest party sends: strategies, and a limit on the time that one may take."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS = 5.0
"""Of processor time that one message may take."""

FAST, ALL = 50, 500
"""Messages for each decoder; of about twenty decoders."""


def messages(count: int) -> settings:
    """So many messages, the same ones in every run: what is found is made a test of its own."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=checks)


class HangError(BaseException):
    """A message took too long. No decoder may catch it."""


@contextmanager
def in_time() -> Iterator[None]:
    """Raises HangError after `SECONDS` of processor time."""

    def end(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


WORDS = (
    "",
    "..",
    "../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\x1b[2J",
    "a\nb",
    "\ud800",
    "é" * 70,
    "CON",
    ".hidden",
    "x" * 5000,
    "NaN",
    "1e999",
    "{a.__class__}",
    "$(id)",
    "0" * 64,
    "hello",
    "train",
)
NUMBERS = (0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 10**300, 10**4000, True, False)
FLOATS = (0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf"))

leaves = st.none() | st.sampled_from(WORDS) | st.sampled_from(NUMBERS) | st.sampled_from(FLOATS) | st.text(max_size=8)


def _deep() -> Any:
    value: Any = 0
    for _ in range(400):
        value = [value]
    return value


names = st.sampled_from(WORDS) | st.text(max_size=8)

plain = st.builds(_deep) | st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=8
)
"""What JSON can hold, and Python's reader takes for JSON."""


@st.composite
def changed(draw: st.DrawFn, honest: Any) -> Any:
    """Honest plain data with one to three places changed, removed or added; sometimes something else altogether."""
    if not draw(st.integers(0, 11)):
        return draw(plain)
    value = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(plain)
        holder, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("replace", "replace", "replace", "remove", "add", "same type")))
        if kind == "remove":
            del holder[key]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(WORDS) | st.text(max_size=5))] = draw(plain)
        elif kind == "add":
            holder.insert(key, draw(plain))
        elif kind == "same type" and isinstance(holder[key], int | float):
            holder[key] = draw(st.sampled_from(NUMBERS) | st.sampled_from(FLOATS))
        elif kind == "same type" and isinstance(holder[key], str):
            holder[key] = draw(st.sampled_from(WORDS))
        else:
            holder[key] = draw(plain)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def written(value: Any) -> bytes:
    """As Python's writer puts it into a message, NaN and half surrogate pairs included."""
    return json.dumps(value).encode()


@st.composite
def damaged(draw: st.DrawFn, honest: bytes) -> bytes:
    """Honest bytes, cut, extended, doubled, or with some of them changed."""
    data = bytearray(honest)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(("flip", "flip", "cut", "insert", "swap", "zero", "big"))):
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = draw(st.binary(min_size=1, max_size=12))
            case "swap":
                data = data[place:] + data[:place]
            case "zero":
                data[place : place + 8] = bytes(len(data[place : place + 8]))
            case "big":
                data[place : place + 8] = b"\xff" * len(data[place : place + 8])
    return bytes(data)


def tried(decode: Callable[[], Any], refusals: tuple[type[BaseException], ...]) -> tuple[bool, Any]:
    """(True, what was decoded), or (False, the typed refusal); any other exception, and a hang, is a failure."""
    try:
        with in_time():
            return True, decode()
    except refusals as refusal:
        if isinstance(refusal, HangError):
            raise
        return False, refusal
