"""What a silo remembers of a run whose noise is correlated across steps (`privacy.mechanism: dp-ftrl`).

The noise of a step is drawn once and for all, so a round's update may leave with one content alone: the difference of
two would have no noise. `<root>/<silo>/<run>/cycle.jsonl` holds the plan that the noise was sized for, a word by which
the key of the noise is known again, and, of each round whose update may have left, the update's hash.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from fedlm.errors import PrivacyError
from fedlm.privacy.chain import Chain
from fedlm.privacy.cycle import Cycle
from fedlm.privacy.mechanisms import to_json

FILE = "cycle.jsonl"


def plan_of(cycle: Cycle) -> dict[str, Any]:
    """The plan as plain JSON."""
    found = {field.name: getattr(cycle, field.name) for field in dataclasses.fields(cycle)}
    return {**found, "mechanism": to_json(cycle.mechanism)}


def plan_hash(cycle: Cycle) -> str:
    """Hex SHA-256 of the plan: what stands in the ledger for the whole run, and keys its noise."""
    return hashlib.sha256(json.dumps(plan_of(cycle), sort_keys=True).encode()).hexdigest()


def begin(chain: Chain, cycle: Cycle, key: str, *, charged: bool) -> None:
    """Hold the run to the plan, and to the noise, that it began with.

    Args:
        key: what follows from the key of the noise and tells nothing of it.
        charged: the run has a ledger already.

    Raises:
        PrivacyError: it began with another one, or what it has sent is not known any more.
    """
    if not chain.records:
        if charged:
            raise PrivacyError(
                "the silo has paid for this run, and what has left in it is not known any more",
                where=str(chain.path),
                fix="restore the file from a copy, or begin another run",
            )
        chain.append({"kind": "plan", "plan": plan_of(cycle), "key": key})
    if chain.records[0].get("plan") != plan_of(cycle):
        raise PrivacyError(
            "the run's noise was sized for other rows, users or steps than there are now",
            where=str(chain.path),
            fix="put the silo's rows back as they were, or begin another run",
        )
    if chain.records[0].get("key") != key:
        raise PrivacyError(
            "the key of the silo's noise is another one than this run began with, and noise of two keys is not one",
            where=str(chain.path),
            fix="restore the key, or begin another run",
        )


def is_new(chain: Chain, round_: int, content: str) -> bool:
    """Whether a round's update has not left yet; False where the same has.

    Args:
        content: hex SHA-256 of the update.

    Raises:
        PrivacyError: the round's noise was used for another update.
    """
    for record in chain.records[1:]:
        if record["round"] != round_:
            continue
        if record["content"] != content:
            raise PrivacyError(
                f"an update of round {round_} may have left already, and another one with the same noise would undo it",
                where=str(chain.path),
                fix="go on from the last round, or begin another run",
            )
        return False
    return True


def note(chain: Chain, round_: int, content: str) -> None:
    """Write down what is about to leave."""
    chain.append({"kind": "round", "round": round_, "content": content})
