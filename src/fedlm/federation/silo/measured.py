"""A silo's part in measuring a model on rows that were held out. The verb 'evaluate'.

Request, tensors: the model. Fields: `role`, whose rows (`rows_of`), whether each row's result is wanted (`items`) and
whether the model is the adapter's own terms, whatever the algorithm (`plain`). Reply: sums and counts, no tensors.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fedlm.errors import DataError
from fedlm.federation.memory import peak_rss
from fedlm.federation.silo.encoded import task_rows
from fedlm.federation.silo.instructions import instructed
from fedlm.federation.silo.refusals import RefusedError
from fedlm.messages import Fields, Request, Tensors

if TYPE_CHECKING:
    from fedlm.algorithms.base import Place
    from fedlm.federation.silo.reference import Reference
    from fedlm.federation.silo.workbench import Workbench
    from fedlm.training.plan import Plan


def held_out(bench: Workbench, silo: str, request: Request) -> Any:
    """The rows that a request asks about.

    Raises:
        DataError: training rows are asked for.
        RefusedError: other silos' rows are, and this process holds none: it is a silo's own, no simulation of many.
    """
    role = request.fields["role"]
    if role not in ("validation", "test"):
        raise DataError("only the roles 'validation' and 'test' can be evaluated", where=f"role '{role}'")
    rows = getattr(bench.silo_data(silo), role)
    if _own(request):
        return rows
    others = bench.data.others(silo, role, len(rows), bench.recipe.seed)
    if len(rows) and not len(others):
        raise RefusedError("no other silo's rows are here: only a simulation can measure a silo's model on them")
    return others


def measured(
    bench: Workbench,
    place: Place,
    plan: Plan,
    request: Request,
    rows: Any,
    kept: Tensors,
    *,
    reference: Reference | None,
    stoppable: AbstractContextManager[None],
) -> Fields:
    """The reply to a request (see above). The model must stand on the bench.

    Args:
        rows: of `held_out`.
        kept: the private state of this silo's last round that counts, where its model is part of that.
        stoppable: ends the measuring where nobody waits for it any longer.
    """
    from fedlm.evaluation import measure

    started, recipe = time.monotonic(), bench.recipe
    data = bench.silo_data(place.silo)
    if recipe.data.instructions is not None:
        role = request.fields["role"]
        rows, _ = task_rows(bench, place.silo, role) if _own(request) else instructed(bench, rows)
    if request.fields.get("plain"):
        bench.put(request.tensors, whole=True)
    else:
        bench.put(bench.algorithm.measured(request.tensors, kept, place))
    with stoppable:
        counts: dict[str, Any] = measure(
            bench.model,
            bench.tokenizer,
            rows,
            data.kind if recipe.data.instructions is None else "messages",
            bench.task,
            plan.evaluation(recipe.evaluation, recipe.training),
            max_length=recipe.training.max_length,
            items=bool(request.fields.get("items", False)),
            packing=recipe.training.packing,
            skip=recipe.data.malformed == "skip",
            reference=reference.inside if reference else None,
            reference_logps=reference.logps if reference else None,
            states=reference.states if reference else None,
        )
    return {**counts, "seconds": time.monotonic() - started, "peak_rss": peak_rss()}


def _own(request: Request) -> bool:
    return bool(request.fields.get("rows_of", "own") == "own")
