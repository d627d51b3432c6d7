"""Ask every silo to measure a model on its held-out rows, and collect the counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fedlm.errors import RunError
from fedlm.messages import Engine, Failure, Request, Tensors


def measure_on_silos(
    engine: Engine,
    silos: Sequence[str],
    tensors: Tensors,
    *,
    role: str,
    run: str,
    items: bool,
    accepted: Mapping[str, int] | None = None,
    rows: Literal["own", "others"] = "own",
) -> dict[str, dict[str, Any]]:
    """`fedlm.evaluation.measure` of every silo, by name.

    Args:
        tensors: the adapter (or weights) to measure; with `accepted`, what `Algorithm.evaluated` gives.
        role: 'validation' or 'test'.
        run: names the requests.
        items: ask for every row's result.
        accepted: by silo, the last round of this run whose update was aggregated: each silo measures the model that it
            makes of this and of what it kept, which for some methods is its own.
        rows: 'others': each silo's model on a keyed sample of the other silos' rows, as many as it has of its own;
            simulated silos alone can do that.

    Raises:
        RunError: a silo gave none; a result without it would be of other rows.
    """
    requests = []
    for silo in silos:
        which = {"plain": True} if accepted is None else {"accepted": accepted.get(silo, -1)}
        fields = {"role": role, "items": items, "rows_of": rows, **which}
        requests.append(Request(silo, "evaluate", run, -1, tensors=tensors, fields=fields))
    measured: dict[str, dict[str, Any]] = {}
    for answer in engine.exchange(requests):
        if isinstance(answer, Failure):
            raise RunError(f"a silo could not be measured: {answer.reason}", where=f"silo '{answer.silo}'")
        measured[answer.silo] = answer.fields
    return {silo: measured[silo] for silo in sorted(measured)}
