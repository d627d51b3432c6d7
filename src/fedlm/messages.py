"""What travels between coordinator and silos: tensors beside plain JSON, and typed failures.

Nothing here is ever pickled between organisations; engines move tensors as safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # relays that only pass bytes on import this module, and must not load torch
    from torch import Tensor

Tensors = dict[str, "Tensor"]
Fields = dict[str, Any]
"""Plain JSON: None, bool, int, float, str, lists and dictionaries of these."""

Event = dict[str, Any]
"""A progress event: {"kind": "step" | "silo_started" | "silo_done" | "round" | ..., ...}. Never training text."""

Observe = Callable[[Event], None]


@dataclass(frozen=True)
class Request:
    """One call through a silo's door. (run, round, attempt, silo, verb) is its idempotency key."""

    silo: str
    verb: str
    run: str
    round: int
    attempt: int = 0
    tensors: Tensors = field(default_factory=dict)
    fields: Fields = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A silo's answer. `received_bytes`/`sent_bytes` are what really travelled, filled in by the engine."""

    silo: str
    verb: str
    run: str
    round: int
    attempt: int = 0
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """What a large one holds may lie in a file and be read tensor by tensor."""
    fields: Fields = field(default_factory=dict)


class FailureKind(StrEnum):
    UNREACHABLE = "unreachable"
    TIMED_OUT = "timed_out"
    REFUSED = "refused"
    OUT_OF_MEMORY = "out_of_memory"
    BAD_UPDATE = "bad_update"
    VERSION_MISMATCH = "version_mismatch"
    ERROR = "error"


@dataclass(frozen=True)
class Failure:
    """Why a silo gave no usable reply; `reason` is one sentence without training text."""

    silo: str
    kind: FailureKind
    reason: str


class Engine(Protocol):
    """Where messages travel: in this process, over worker processes, a cluster, or between organisations."""

    def silos(self) -> Sequence[str]:
        """Names of all enrolled silos, in canonical (sorted) order."""
        ...

    def exchange(self, requests: Iterable[Request], deadline: float | None = None) -> Iterator[Reply | Failure]:
        """Send every request and yield one reply or typed failure each, as they arrive.

        Safe to call from several threads. `deadline` is in seconds from the call; a request that has no reply by
        then yields `Failure(kind=TIMED_OUT)` and its later reply is dropped.
        """
        ...

    def close(self) -> None: ...
