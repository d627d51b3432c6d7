"""The sums that a silo has helped to unmask, over all its runs: from which model, and over which silos.

Two sums of updates from one model over cohorts that differ in one silo tell that silo's update by their difference. In
one round of a run the protocol itself allows one cohort only; other runs it does not know. So a silo remembers.

One file, `_sums.db` (SQLite) in the silo's private folder. A model is known by the hash of all that was trained from:
one that differs in its last bit is another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fedlm.errors import RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.silo.refusals import RefusedError

FILE = "_sums.db"
"""No run's name begins with '_'."""

LINE = "min_cohort_difference"
"""Of the silo's policy."""

TABLES = """
CREATE TABLE IF NOT EXISTS cohorts (id INTEGER PRIMARY KEY, members TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS sums (model TEXT, cohort INTEGER, PRIMARY KEY (model, cohort)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS begun (session TEXT PRIMARY KEY, round INTEGER, attempt INTEGER, model TEXT NOT NULL);
"""


class Sums:
    """One silo's.

    Args:
        folder: the silo's private folder.
        apart: silos by which two cohorts must differ at least, unless they are the same.
    """

    def __init__(self, folder: Path, apart: int) -> None:
        self._file, self._apart = folder / FILE, apart

    def begin(self, session: str, when: tuple[int, int], model: str, cohort: Iterable[str]) -> None:
        """Before anything is computed from a model: note which one it is, in the place of what was begun before.

        Args:
            session: of secure aggregation; one of each is under way at a time.
            when: its round and attempt.
            cohort: the silos that a sum would be over if none drops out.

        Raises:
            RefusedError: sums over nearly the same silos were unmasked before.
            RunError: the file is damaged, or the disk is full.
        """
        with self._open() as base:
            self._check(base, model, cohort)
            base.execute("INSERT OR REPLACE INTO begun VALUES (?, ?, ?, ?)", (session, *when, model))

    def add(self, session: str, when: tuple[int, int], cohort: Iterable[str]) -> None:
        """A sum is about to be unmasked: remember it for good.

        Args:
            cohort: the silos that it is over.

        Raises:
            RefusedError, RunError: as `begin`; nothing was remembered.
        """
        members = json.dumps(sorted(cohort))
        with self._open() as base:
            known = base.execute(
                "SELECT model FROM begun WHERE session = ? AND round = ? AND attempt = ?", (session, *when)
            ).fetchone()
            if known is None:
                raise RefusedError("this silo does not know any more from which model it began this attempt")
            self._check(base, known[0], json.loads(members))
            base.execute("INSERT OR IGNORE INTO cohorts (members) VALUES (?)", (members,))
            base.execute("INSERT OR IGNORE INTO sums SELECT ?, id FROM cohorts WHERE members = ?", (known[0], members))

    def _check(self, base: sqlite3.Connection, model: str, cohort: Iterable[str]) -> None:
        """Raises RefusedError: see `begin`."""
        now = set(cohort)
        found = base.execute("SELECT members FROM sums JOIN cohorts ON id = cohort WHERE model = ?", (model,))
        nearest = min((d for (members,) in found if (d := len(now ^ set(json.loads(members))))), default=None)
        if nearest is not None and nearest < self._apart:
            silos = "one silo" if nearest == 1 else f"{nearest} silos"
            raise RefusedError(
                f"this silo helped to unmask a sum from the same model over a cohort that differs from this one by "
                f"{silos}, and both sums would tell what {'that one' if nearest == 1 else 'so few'} sent (its policy: "
                f"{LINE}: {self._apart}); ask the same silos again, or start from another model",
                LINE,
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is on disk once it ends, or has changed nothing."""
        with disk_errors(self._file, "silo's state"):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._file, os.O_RDWR | os.O_CREAT, 0o600))
        try:
            # Another process of this silo may be at it, for moments.
            with closing(sqlite3.connect(self._file, timeout=60, isolation_level=None)) as base:
                base.executescript(TABLES)
                base.execute("BEGIN IMMEDIATE")
                with base:  # commits, or rolls back
                    yield base
        except sqlite3.Error as error:
            raise RunError(
                f"what this silo knows of earlier sums cannot be read or written ({error})",
                where=str(self._file),
                fix="make room on the disk; if the file is damaged, restore it, or remove it once it is clear why: "
                "sums before that are then forgotten",
            ) from None


def model_hash(purpose: str, base: str, *tensors: str) -> str:
    """Hex SHA-256 of what a sum's parts are computed from.

    Args:
        purpose: 'train', or the rows that a model is measured on.
        base: hash of the base model.
        tensors: hashes of what lies on it.
    """
    return hashlib.sha256("\x1f".join([purpose, base, *tensors]).encode()).hexdigest()
