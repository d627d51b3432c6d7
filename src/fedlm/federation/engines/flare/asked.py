"""A request that a silo's relay has taken, what became of it, and what it must be to be taken at all."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlm.federation.engines.flare.parts import Incoming
from fedlm.federation.engines.lines import Message

MAX_REQUEST = 2**20
"""Bytes of a request without its tensors; a recipe has some thousand."""

LONGEST_WORD = 300
"""Characters of a name or a verb."""

MAX_RETRIES = 10
"""As in a recipe."""

MAX_EVENTS = 200
"""Progress events that are kept while nobody fetches them."""


@dataclass
class Asked:
    """One request and what became of it."""

    number: int
    message: Message
    retries: int
    patience: float
    """Seconds that a missing worker is waited for."""
    tensors: Incoming | None
    since: float = field(default_factory=time.monotonic)
    """When the worker was last there, or the request came."""
    heard: float = field(default_factory=time.monotonic)
    """When the coordinator last asked for it."""
    deaths: int = 0
    working: bool = False
    events: deque[Any] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))
    told: int = 0
    answer: Message | None = None
    file: Path | None = None
    size: int = 0
    digest: str = ""


def checked(request: Message) -> Message:
    """A request with what a request has, and nothing else: the worker need not be asked what it cannot read.

    Raises:
        KeyError, TypeError, ValueError: it is none.
    """
    words = {name: str(request[name])[:LONGEST_WORD] for name in ("silo", "verb", "run")}
    numbers = {name: request[name] for name in ("round", "attempt")}
    if not all(type(n) is int and abs(n) < 2**31 for n in numbers.values()):
        raise ValueError("no numbers")
    checked = {**words, **numbers, "fields": dict(request["fields"])}
    if len(json.dumps(checked)) > MAX_REQUEST:
        raise ValueError("too long")
    return checked
