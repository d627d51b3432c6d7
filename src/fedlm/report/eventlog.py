"""A run's events as log lines instead of a display: for services whose log a machine collects (`--json-logs`)."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

from fedlm.logs import RESERVED
from fedlm.messages import Event
from fedlm.report.format import is_number

log = logging.getLogger("fedlm.run")

SILOS = 200
"""Of each round so many silos' replies are logged one by one; failures always are."""


class EventLog:
    """Stands in for `Progress`: the same calls, one log line per event. Steps are logged at level DEBUG."""

    def __init__(self) -> None:
        self._replies: dict[int, int] = {}

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def warn(self, sentence: str) -> None:
        """Something needs the user's attention."""
        log.warning(sentence)

    def __call__(self, event: Event) -> None:
        """Log one event; safe from any thread, as logging is."""
        kind, fields = str(event.get("kind")), _fields(event)
        if kind == "phase":
            log.info(str(event.get("text", "")), extra=fields)
        elif kind == "silo_failed":
            log.warning("silo failed", extra=fields)
        elif kind in ("silo_started", "step"):
            log.debug(kind.replace("_", " "), extra=fields)
        elif kind == "silo_done":
            number = int(event.get("round", -1))
            count = self._replies[number] = self._replies.get(number, 0) + 1
            log.log(logging.INFO if count <= SILOS else logging.DEBUG, "silo done", extra=fields)
        else:
            if kind == "round_done":
                self._replies.clear()
            log.info(kind.replace("_", " "), extra=fields)


def _fields(event: Event) -> dict[str, Any]:
    """What a line says of an event: figures and short words; of lists and tables how long they are."""
    fields: dict[str, Any] = {}
    for name, value in event.items():
        if name in ("kind", "text") or name in RESERVED:
            continue
        if isinstance(value, list | dict):
            fields[name] = len(value)
        elif value is None or isinstance(value, str | bool) or is_number(value):
            fields[name] = value
    loss = (event.get("validation") or {}).get("loss")
    if is_number(loss):
        fields["validation_loss"] = loss
    fields.pop("validation", None)
    return fields
