"""What a silo has agreed to: one file per run, so that a restarted worker can go on with it.

`<root>/<silo>/<run>/recipe.json` holds the recipe as the coordinator sent it, beside the run's private states. It has a
layout version and a checksum: a damaged file is said, never guessed at.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.federation.disk import disk_errors
from fedlm.files import write_json

LAYOUT = 1

RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
"""Names of runs: they become names of folders."""


@dataclass(frozen=True)
class Agreement:
    """A run that this silo takes part in."""

    run: str
    fedlm: str
    """Version of fedlm that agreed."""
    recipe: dict[str, Any]
    model: dict[str, str]
    """Fingerprint of the base model, as this silo loads it."""
    data: str
    """Fingerprint of the rows that the silo brings."""
    capacity: dict[str, Any] = field(default_factory=dict)
    """What the run says that this silo can do."""


def save(folder: Path, agreement: Agreement) -> None:
    """Keep an agreement, readable by the owner only.

    Raises:
        RunError: the disk is full or read-only.
    """
    file = _file(folder, agreement.run)
    with disk_errors(file, "silo's state"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        body = asdict(agreement)
        write_json(file, {"layout": LAYOUT, "sha256": _checksum(body), "agreement": body})
        file.chmod(0o600)


def load(folder: Path, run: str) -> Agreement | None:
    """The agreement on a run, or None where there is none.

    Raises:
        RunError: the file is damaged, or has another layout.
    """
    file = _file(folder, run)
    try:
        stored = json.loads(file.read_bytes())
        if stored["layout"] != LAYOUT:
            raise RunError(
                f"what this silo agreed to has layout {stored['layout']}, this fedlm reads layout {LAYOUT}",
                where=str(file),
                fix="finish the run with the version of fedlm that began it",
            )
        body = stored["agreement"]
        if _checksum(body) != stored["sha256"]:
            raise ValueError
        return Agreement(**body)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise RunError(
            "what this silo agreed to for this run is damaged or cannot be read",
            where=str(file),
            fix="remove the file; a coordinator that greets the silo again can then go on",
        ) from None


def _file(folder: Path, run: str) -> Path:
    return folder / run / "recipe.json"


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
