"""Logs of fedlm's processes: plain lines, or one JSON object per line for machines that collect them.

`--json-logs` or FEDLM_LOG=json chooses JSON; child processes inherit the choice by the environment. A log line says
what happened, to which run and silo; of an exception it holds the type and the place in the code, never the message,
since libraries quote their input in messages and that may be training text. Imports no torch: relays use it too.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import sys
import time
import traceback
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from fedlm.errors import RunError

VARIABLE = "FEDLM_LOG"

LARGEST_FILE, OLD_FILES = 10_000_000, 5
"""A log file's size at which it is put aside, and how many of these are kept."""

LONGEST = 8000
"""Characters of one message: a foreign library may log anything."""

OURS = "fedlm"
"""Name of the handler that `configure` installs."""

RESERVED = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
"""Names that `extra=` may not use: every record has them."""


def wanted() -> bool:
    """Whether FEDLM_LOG asks for JSON.

    Raises:
        RunError: it holds something else than 'json', 'text' or nothing.
    """
    value = os.environ.get(VARIABLE, "").lower()
    if value not in ("", "text", "json"):
        raise RunError(f"{VARIABLE} is '{value}'", where="environment", fix=f"set {VARIABLE}=json, or =text, or none")
    return value == "json"


def configure(json_lines: bool, file: Path | None = None, *, level: int = logging.INFO, **always: Any) -> None:
    """Send this process's log to standard error, or to a file that rotates and that only its owner can read.

    Called again, it replaces what the first call chose. Children that call `configure(wanted())` log alike.

    Args:
        json_lines: one JSON object per line instead of plain text.
        level: of fedlm's own lines; libraries are heard from WARNING on.
        file: write there instead of standard error; its folder exists.
        always: fields of every line, e.g. role="silo", silo="hospital-a".

    Raises:
        RunError: the file cannot be written.
    """
    os.environ[VARIABLE] = "json" if json_lines else "text"
    handler: logging.Handler
    try:
        handler = _PrivateFile(file, maxBytes=LARGEST_FILE, backupCount=OLD_FILES) if file else _Stream()
    except OSError as error:
        raise RunError(
            f"the log cannot be written: {error.strerror}", where=str(file), fix="give permission, or make its folder"
        ) from error
    handler.setFormatter(JsonLines(**always) if json_lines else PlainLines(**always))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if old.get_name() == OURS or type(old) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(old)
            old.close()
    handler.set_name(OURS)
    root.addHandler(handler)
    root.setLevel(max(level, logging.WARNING))
    logging.getLogger("fedlm").setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught if json_lines else sys.__excepthook__


def as_json() -> bool:
    """Whether `configure` chose JSON for this process."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


class JsonLines(logging.Formatter):
    """A record as one JSON object: time (UTC), level, logger, message, and whatever `extra=` held.

    Usable from NVFlare's log_config.json too: {"()": "fedlm.logs.JsonLines"}.
    """

    def __init__(self, **always: Any) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **self._always,
            **_extra(record),
        }
        # default=str: a log line is never worth an exception; nor is half a surrogate pair, which no file takes
        return json.dumps(line, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()


class PlainLines(logging.Formatter):
    """A record as one line for people: time, level, logger, message, and extra fields as name=value."""

    def __init__(self, **always: Any) -> None:
        super().__init__()
        self._always = always

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in {**self._always, **_extra(record)}.items())
        line = f"{_time(record.created)} {record.levelname.lower()} {record.name}: {_message(record)}{fields}"
        # words from elsewhere must neither end the line nor reach a terminal as commands
        return "".join(c if c.isprintable() else " " for c in line.encode(errors="backslashreplace").decode())


class _Terse(logging.Handler):
    """Where a line cannot be written (full disk, closed stream), logging itself would print the traceback of every
    error at hand, and these quote what a library was given."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        with suppress(OSError, ValueError, AttributeError):  # no stream is left to tell it on
            sys.stderr.write(f"a log line of {record.name} was lost: {type(sys.exc_info()[1]).__name__}\n")


class _Stream(_Terse, logging.StreamHandler[TextIO]):
    """Standard error."""


class _PrivateFile(_Terse, logging.handlers.RotatingFileHandler):
    """A rotating log whose files only their owner can read."""

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.fchmod(descriptor, 0o600)  # also a file that was there before
        return TextIOWrapper(os.fdopen(descriptor, "ab"), encoding="utf-8")


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"


def _message(record: logging.LogRecord) -> str:
    try:
        text = record.getMessage()
    except (TypeError, ValueError):  # a library's format string does not fit its arguments
        text = str(record.msg)
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    fields = {name: value for name, value in vars(record).items() if name not in RESERVED and name[0] != "_"}
    if record.exc_info and record.exc_info[1] is not None:
        fields["error"] = type(record.exc_info[1]).__name__
        if frames := traceback.extract_tb(record.exc_info[2]):
            fields["place"] = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
    return fields


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    logging.getLogger("fedlm").critical("stopped by an error that nobody caught", exc_info=(kind, error, trace))
