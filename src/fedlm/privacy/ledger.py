"""The budget: what was spent is on disk before anything is released, and what would exceed it is not released.

    with Ledger(path, budget) as ledger:
        ledger.charge(event)     # returns once it is on disk, or raises
        send(stored_bytes)       # whose hash the event names

A ledger is for one unit and one adjacency. Who keeps two kinds of promise keeps two ledgers.

Silos hold different units: a release of one silo's costs that silo's units alone, so each silo has its own sum
(parallel composition). Users may have rows in several silos, so with users as units every release counts for everybody.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, get_args

from fedlm.errors import BudgetExceeded, PrivacyError
from fedlm.privacy.accounting import Spent, merged, not_in_rdp, rdp_epsilon, spent
from fedlm.privacy.calibration import check_budget
from fedlm.privacy.chain import Chain, Record, read_chain
from fedlm.privacy.mechanisms import Adjacency, Mechanism, Unit, describe, from_json, times, to_json

SCHEMA = 1


@dataclass(frozen=True)
class Budget:
    """What may be spent, and by whom.

    Args:
        unit, adjacency: of every event.
        epsilon, delta: for each unit, over everything that the ledger holds.
        units: how many units each silo has; delta must be below 1 over the fewest. With silos as units, 1 each, and
            delta must be below 1 over the number of silos.
    """

    unit: Unit
    adjacency: Adjacency
    epsilon: float
    delta: float
    units: Mapping[str, int]

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit) or self.adjacency not in get_args(Adjacency):
            raise PrivacyError(f"'{self.unit}' and '{self.adjacency}' are no unit and adjacency")
        if not self.units or any(not isinstance(count, int) or count < 1 for count in self.units.values()):
            raise PrivacyError("a budget names its silos, each with at least one unit")
        fewest = len(self.units) if self.unit == "silo" else min(self.units.values())
        check_budget(self.epsilon, self.delta, fewest)


@dataclass(frozen=True)
class Event:
    """One release that is about to happen.

    Args:
        run: which run; a resumed run is the same.
        round: of it.
        attempt: how often this round's release was made from the data anew.
        silo: whose units it is about; None: every silo's.
        mechanism: all that this release costs.
        content: hex SHA-256 of the bytes to be sent, as stored.
        stage: of a pipeline.
    """

    run: str
    round: int
    attempt: int
    silo: str | None
    mechanism: Mechanism
    content: str
    stage: str = ""


@dataclass(frozen=True)
class Receipt:
    """Proof that an event is in the ledger. Kept elsewhere it shows whether lines were cut off (`Ledger(expect=...)`).

    Args:
        index, digest: of its line.
        charged: False where the same bytes were charged before.
    """

    index: int
    digest: str
    charged: bool


class Ledger:
    """A budget and its file, open for writing.

    Args:
        path: created if it is not there.
        budget: must be the file's, if it is.
        expect: a receipt that must still be in it.

    Raises:
        PrivacyError: the file is damaged, open elsewhere, of another budget, or lacks the receipt.
    """

    def __init__(self, path: Path, budget: Budget, expect: Receipt | None = None) -> None:
        self.budget = budget
        self._chain = Chain(path)
        try:
            if not self._chain.records:
                self._chain.append(_opened(budget))
            self._state = _State(path, self._chain.records)
            if self._state.budget != budget:
                raise PrivacyError(
                    f"it was opened with another budget: {_words(self._state.budget)}; asked for: {_words(budget)}",
                    where=str(path),
                    fix="begin another ledger, and include this one",
                )
            if expect is not None and not self._chain.holds(expect.index, expect.digest):
                raise PrivacyError(
                    f"line {expect.index + 1}, for which there is a receipt, is missing or another",
                    where=str(path),
                    fix="restore the ledger from a copy; until then nothing may be released",
                )
        except BaseException:
            self._chain.close()
            raise

    @property
    def recovered(self) -> bool:
        """Whether a line that a crash had torn was completed, and counts, when the file was opened."""
        return self._chain.recovered

    def charge(self, event: Event) -> Receipt:
        """Spend what the event costs. Release only after this returned.

        The same bytes of the same run, stage, round, attempt, silo and mechanism were paid for already; other bytes are
        not.

        Raises:
            BudgetExceeded: it would exceed the budget; nothing is spent.
            PrivacyError: the event is of another unit, adjacency or silo, or no accountant covers it.
        """
        body = _body(event)
        if (known := self._state.find(body)) is not None:
            return Receipt(known["index"], known["hash"], charged=False)
        for silos, already in self._state.groups(event).items():
            self._check(silos, already, event.mechanism)
        record = self._chain.append(body)
        self._state.add(record)
        return Receipt(record["index"], record["hash"], charged=True)

    def include(self, earlier: Path) -> int:
        """Take over every event of another ledger, of the same unit and adjacency; how many were new.

        Events keep the hashes of their lines, so that including a file again, or one that includes another, counts
        nothing twice. They count even where they exceed the budget: they have happened.
        """
        other = _State(earlier, read_chain(earlier))
        mine, theirs = self.budget, other.budget
        if (mine.unit, mine.adjacency) != (theirs.unit, theirs.adjacency):
            raise PrivacyError(
                f"it protects against {theirs.adjacency} of a {theirs.unit}, this ledger against {mine.adjacency} of a "
                f"{mine.unit}",
                where=str(earlier),
            )
        new = [entry for entry in other.entries if entry["origin"] not in self._state.origins]
        for entry in new:
            self._state.check(from_json(entry["mechanism"]), entry["silo"])
        if new:
            self._state.add(self._chain.append({"kind": "included", "file": earlier.name, "events": new}))
        return len(new)

    def spent(self, silo: str | None = None) -> Spent:
        """What was spent by a silo's units, or by those that spent most."""
        return self._state.spent(silo)

    def close(self) -> None:
        """Let others write."""
        self._chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, silos: tuple[str, ...], already: Counter[Mechanism], asked: Mechanism) -> None:
        delta, limit = self.budget.delta, self.budget.epsilon
        after = merged([*_counted(already), asked])
        # RDP takes milliseconds, and is an upper bound as well.
        if all(not_in_rdp(mechanism) is None for mechanism in after) and rdp_epsilon(after, delta) <= limit:
            return
        total = _spent(after, delta).epsilon
        if total > limit:
            before = _spent(merged(_counted(already)), delta).epsilon
            raise BudgetExceeded(
                f"{', '.join(silos)}: epsilon {before:.4g} of {limit:g} is spent at delta {delta:g}; this release "
                f"({describe(asked)}) would make it {total:.4g}",
                where=str(self._chain.path),
                fix="stop here, or agree on another budget with whose data it is",
            )


def read_spent(path: Path, silo: str | None = None) -> tuple[Budget, Spent]:
    """A ledger's budget and what is spent of it, while another process may be writing."""
    state = _State(path, read_chain(path))
    return state.budget, state.spent(silo)


class _State:
    """What a chain's records say."""

    def __init__(self, path: Path, records: Iterable[Record]) -> None:
        first, *rest = [*records] or [{}]
        if first.get("kind") != "opened" or first.get("schema") != SCHEMA:
            raise PrivacyError(f"it is not a privacy ledger of schema {SCHEMA}", where=str(path))
        self.entries: list[dict[str, Any]] = []
        self.origins: set[str] = set()
        self._known: dict[tuple[str, ...], Record] = {}
        try:
            self.budget = Budget(**{field.name: first[field.name] for field in dataclasses.fields(Budget)})
            self._sums = {silo: Counter[Mechanism]() for silo in self.budget.units}
            for record in rest:
                self.add(record)
        except (KeyError, TypeError) as error:
            raise PrivacyError(f"a line of it lacks what a privacy ledger has ({error})", where=str(path)) from error

    def add(self, record: Record) -> None:
        if record["kind"] == "charged":
            self._known[_key(record)] = record
            self._count({name: record[name] for name in _FIELDS} | {"origin": record["hash"]})
        elif record["kind"] == "included":
            for entry in record["events"]:
                # Sent once more by the resumed run, the same bytes are paid for.
                self._known.setdefault(_key(entry), record)
                self._count(entry)
        else:
            raise PrivacyError(f"line {record['index'] + 1} is of an unknown kind, '{record['kind']}'")

    def find(self, body: Record) -> Record | None:
        return self._known.get(_key(body))

    def check(self, mechanism: Mechanism, silo: str | None) -> None:
        """Raises PrivacyError: it is not about this budget's units."""
        mine = self.budget
        if (mechanism.unit, mechanism.adjacency) != (mine.unit, mine.adjacency):
            raise PrivacyError(
                f"the ledger protects against {mine.adjacency} of a {mine.unit}; the release is accounted for "
                f"{mechanism.adjacency} of a {mechanism.unit}",
                fix="keep a ledger for each",
            )
        if silo is not None and silo not in mine.units:
            raise PrivacyError(f"the ledger has no silo '{silo}'", fix=f"it has {', '.join(sorted(mine.units))}")

    def groups(self, event: Event) -> dict[tuple[str, ...], Counter[Mechanism]]:
        """Silos that the event is about, those with the same past together."""
        self.check(event.mechanism, event.silo)
        found: dict[tuple[Mechanism, ...], list[str]] = {}
        for silo in self._about(event.silo):
            found.setdefault(merged(_counted(self._sums[silo])), []).append(silo)
        return {tuple(silos): self._sums[silos[0]] for silos in found.values()}

    def spent(self, silo: str | None) -> Spent:
        if silo is not None and silo not in self._sums:
            raise PrivacyError(f"the ledger has no silo '{silo}'", fix=f"it has {', '.join(sorted(self._sums))}")
        sums = self._sums.values() if silo is None else [self._sums[silo]]
        pasts = {merged(_counted(past)) for past in sums}
        return max((_spent(past, self.budget.delta) for past in pasts), key=lambda found: found.epsilon)

    def _count(self, entry: dict[str, Any]) -> None:
        self.origins.add(entry["origin"])
        self.entries.append(entry)
        mechanism = from_json(entry["mechanism"])
        self.check(mechanism, entry["silo"])
        for silo in self._about(entry["silo"]):
            self._sums[silo][times(mechanism, 1)] += mechanism.count

    def _about(self, silo: str | None) -> list[str]:
        return list(self._sums) if silo is None or self.budget.unit == "user" else [silo]


_FIELDS = tuple(field.name for field in dataclasses.fields(Event))


def _opened(budget: Budget) -> Record:
    fields = {field.name: getattr(budget, field.name) for field in dataclasses.fields(budget)}
    return {"kind": "opened", "schema": SCHEMA, **fields, "units": dict(budget.units)}


def _body(event: Event) -> Record:
    fields = {name: getattr(event, name) for name in _FIELDS}
    content = event.content
    if len(content) != 64 or set(content) - set("0123456789abcdef"):
        raise PrivacyError("the content is not a hex SHA-256", fix="hash the bytes as they are stored and sent")
    return {"kind": "charged", **fields, "mechanism": to_json(event.mechanism)}


def _key(entry: Record) -> tuple[str, ...]:
    return tuple(json.dumps(entry[name], sort_keys=True) for name in _FIELDS)


def _counted(past: Counter[Mechanism]) -> list[Mechanism]:
    return [times(mechanism, count) for mechanism, count in past.items()]


@lru_cache(maxsize=64)
def _spent(mechanisms: tuple[Mechanism, ...], delta: float) -> Spent:
    return spent(mechanisms, delta)


def _words(budget: Budget) -> str:
    return (
        f"({budget.epsilon:g}, {budget.delta:g}) against {budget.adjacency} of a {budget.unit}, "
        f"{sum(budget.units.values())} units in {len(budget.units)} silos"
    )
