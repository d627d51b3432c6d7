"""What noise on text has cost a silo's tokens, over all of its runs; on disk before anything leaves.

One file, `_tokens.jsonl` in the silo's private folder, a chain of hashes that survives a crash at any moment
(`fedlm.privacy.chain`). A draw is known by what it follows from: the silo's secret, its rows, the model, epsilon. The
same draw tells nothing new, in whatever round or run, and is charged once; any other is independent of it and is
charged again.

The unit is one token in its place in a row. The mechanism is of pure epsilon (`fedlm.privacy.text`), so epsilons of
draws add up, with a delta of 0 (basic composition: Dwork and Roth, 2014, theorem 3.14), and no accountant is needed.
The sum is that of a token which was in every draw; tokens of rows that were in fewer have spent less. What may be
spent is the owner's word of the day and no part of the file, which is why this is no `fedlm.privacy.ledger.Ledger`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from fedlm.errors import PrivacyError
from fedlm.federation.disk import disk_errors
from fedlm.federation.silo.refusals import RefusedError
from fedlm.privacy.chain import Chain, Record, read_chain

FILE = "_tokens.jsonl"
"""No run's name begins with '_'."""

OPENED = {"kind": "opened", "schema": 1, "unit": "token"}


@dataclass(frozen=True)
class Draw:
    """A silo's rows, drawn anew.

    Args:
        key: hex SHA-256 of all that the draw follows from.
        content: hex SHA-256 of what was drawn.
        epsilon: of a token.
    """

    key: str
    content: str
    epsilon: float


@dataclass(frozen=True)
class TokenBudget:
    """What draws may cost a token.

    Args:
        epsilon: of all draws together that are new in a run, a month or a year; None: without limit.
        per: which of these.
        today: by the clock of the policy.
    """

    epsilon: float | None
    per: Literal["month", "year", "run"]
    today: date

    def counts(self, record: Record, run: str) -> bool:
        """Whether an earlier draw is in the same run, month or year."""
        if self.per == "run":
            return bool(record["run"] == run)
        return str(record["day"]).startswith(f"{self.today:%Y-%m}" if self.per == "month" else f"{self.today:%Y}")


@dataclass(frozen=True)
class TokensSpent:
    """What a token has spent at most: epsilon, and over how many draws."""

    epsilon: float
    draws: int


def charge(folder: Path, draw: Draw, run: str, budget: TokenBudget) -> None:
    """Write a draw down; what is made of it may leave afterwards. The same draw is charged once.

    Args:
        folder: the silo's private one.
        run: in which it is new.

    Raises:
        RefusedError: it would cost more than the owner allows; nothing is spent.
        PrivacyError: the ledger is damaged or open elsewhere; or the same randomness gave something else before.
        RunError: the ledger cannot be written.
    """
    path = folder / FILE
    with disk_errors(path, "silo's ledger"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with Chain(path) as chain:
            if not chain.records:
                chain.append(OPENED)
            drawn = _drawn(path, chain.records)
            if _is_known(path, drawn, draw):
                return
            _check(drawn, draw, run, budget)
            fields = {"draw": draw.key, "content": draw.content, "epsilon": draw.epsilon}
            chain.append({"kind": "drawn", **fields, "run": run, "day": budget.today.isoformat()})


def tokens_spent(folder: Path) -> TokensSpent | None:
    """What a silo's ledger says, while its silo may be writing; None where there is none.

    Args:
        folder: the silo's private one.

    Raises:
        PrivacyError: it is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    drawn = _drawn(path, read_chain(path))
    return TokensSpent(_sum(drawn), len(drawn))


def _drawn(path: Path, records: list[Record]) -> list[Record]:
    """The lines of draws.

    Raises:
        PrivacyError: the file holds something else.
    """
    first, *rest = records or [{}]
    whole = {name: first.get(name) for name in OPENED} == OPENED
    for record in rest:
        words = [record.get(name) for name in ("draw", "content", "run", "day")]
        epsilon = record.get("epsilon")
        whole &= record.get("kind") == "drawn" and all(isinstance(word, str) for word in words)
        whole &= isinstance(epsilon, float) and 0 < epsilon < math.inf
    if not whole:
        raise PrivacyError(
            "it is not a ledger of noise on text as this version writes it",
            where=str(path),
            fix="restore it from a copy; until then nothing may be released",
        )
    return rest


def _is_known(path: Path, drawn: Iterable[Record], draw: Draw) -> bool:
    """Whether a draw is paid for.

    Raises:
        PrivacyError: one of the same key gave other rows. Both came from the same randomness, and what two such draws
            tell together no sum of epsilons bounds.
    """
    for record in drawn:
        if record["draw"] != draw.key:
            continue
        if record["content"] != draw.content:
            raise PrivacyError(
                "the silo's rows, drawn from the same secret as before, came out as others: another version of a "
                "library, or damaged rows",
                where=str(path),
                fix="put back what has changed; or remove the silo's _noise.key, so that they are drawn from another "
                "secret, and charged again",
            )
        return True
    return False


def _check(drawn: Iterable[Record], draw: Draw, run: str, budget: TokenBudget) -> None:
    """Raises RefusedError: with this draw a token would have spent more than the owner allows."""
    limit, before = budget.epsilon, _sum(record for record in drawn if budget.counts(record, run))
    if limit is not None and before + draw.epsilon > limit:
        raise RefusedError(
            f"this silo's policy allows noise on text an epsilon of {limit:g} a token per {budget.per} "
            f"(privacy.max_token_epsilon); draws of this {budget.per} have cost {before:g} of it, and this one would "
            f"cost another {draw.epsilon:g} (in_context.token_epsilon); a draw as in an earlier run costs nothing",
            "privacy.max_token_epsilon",
        )


def _sum(drawn: Iterable[Record]) -> float:
    return math.fsum(record["epsilon"] for record in drawn)
