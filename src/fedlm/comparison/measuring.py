"""Ask every silo to measure a model on its held-out rows, and collect the counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedlm.errors import RunError
from fedlm.messages import Engine, Failure, Request, Tensors


def measure_on_silos(
    engine: Engine, silos: Sequence[str], tensors: Tensors, *, role: str, run: str, items: bool
) -> dict[str, dict[str, Any]]:
    """`fedlm.evaluation.measure` of every silo, by name.

    Args:
        tensors: the adapter (or weights) to measure.
        role: 'validation' or 'test'.
        run: names the requests.
        items: ask for every row's result.

    Raises:
        RunError: a silo gave none; a result without it would be of other rows.
    """
    fields = {"role": role, "items": items}
    requests = [Request(silo, "evaluate", run, -1, tensors=tensors, fields=fields) for silo in silos]
    measured: dict[str, dict[str, Any]] = {}
    for answer in engine.exchange(requests):
        if isinstance(answer, Failure):
            raise RunError(f"a silo could not be measured: {answer.reason}", where=f"silo '{answer.silo}'")
        measured[answer.silo] = answer.fields
    return {silo: measured[silo] for silo in sorted(measured)}
