"""What travels between coordinator and silos: tensors beside plain JSON, and typed failures.

Nothing here is ever pickled between organisations; engines move tensors as safetensors.
"""

from __future__ import annotations

import threading
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
    """One call through a silo's door. (run, round, attempt, silo, verb) is its idempotency key, with the field
    `dispatch` where there is one: in an asynchronous federation a silo may train more than once in a round."""

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
    STALE = "stale"
    UNSYNCED = "unsynced"
    ERROR = "error"


@dataclass(frozen=True)
class Failure:
    """Why a silo gave no usable reply; `reason` is one sentence without training text."""

    silo: str
    kind: FailureKind
    reason: str


class Stop:
    """Ends an exchange from another thread, as if its deadline had come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waking: list[Callable[[], None]] = []
        self.called = False

    def now(self) -> None:
        """Stop; for good."""
        with self._lock:
            self.called, waking = True, self._waking
            self._waking = []
        for wake in waking:
            wake()

    def then(self, wake: Callable[[], None]) -> None:
        """Call this when it is time to stop, perhaps from another thread; at once if it is already."""
        with self._lock:
            if not self.called:
                self._waking.append(wake)
                return
        wake()


class Engine(Protocol):
    """Where messages travel: in this process, over worker processes, a cluster, or between organisations."""

    def silos(self) -> Sequence[str]:
        """Names of all enrolled silos, in canonical (sorted) order."""
        ...

    def exchange(
        self, requests: Iterable[Request], deadline: float | None = None, stop: Stop | None = None
    ) -> Iterator[Reply | Failure]:
        """Send every request and yield one reply or typed failure each, as they arrive.

        Safe to call from several threads. `deadline` is in seconds from the call; a request that has no reply by
        then, or when `stop` is called, yields `Failure(kind=TIMED_OUT)` and its later reply is dropped.
        """
        ...

    def close(self) -> None: ...
