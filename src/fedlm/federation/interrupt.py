"""Ctrl-C that never tears: it stops waiting at once, but lets a commit to disk finish first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any


class Interrupt:
    """Within this context SIGINT and SIGTERM raise KeyboardInterrupt, outside of `deferred()` sections at once, else at
    their end. In threads other than the main one signals never arrive, and this does nothing."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._depth = 0
        self._pending = False

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._arrive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A section that a signal does not cut short."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._pending and self._depth == 0:
            self._pending = False
            raise KeyboardInterrupt

    def _arrive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._depth:
            self._pending = True
        else:
            raise KeyboardInterrupt
