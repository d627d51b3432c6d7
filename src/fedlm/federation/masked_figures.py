"""Measuring a model on rows that silos hold out, where the coordinator sees the sum of their figures and no silo's
(`fedlm.federation.aggregation`, `fedlm.guards.summed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fedlm.errors import RunError, UpdateRefused
from fedlm.evaluation import summarise
from fedlm.federation.aggregation import Note, Vectors, aggregate
from fedlm.federation.figures import check_counts
from fedlm.federation.records import Traffic, failure_lines, reasons
from fedlm.federation.sampling import quorum
from fedlm.guards.summed import figures_agreed, figures_length, figures_ring, shown_figures
from fedlm.messages import Failure, Fields, Reply, Request, Tensors

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations


def measure_masked(
    silos: Conversations,
    tensors: Tensors,
    role: str,
    number: int,
    panel: Sequence[str],
    traffic: Traffic,
    accepted: Mapping[str, int],
) -> Fields:
    """A summary over the rows of all these silos; of none by itself, so without `fairness` and `silos`.

    Args:
        tensors: the model.
        role: of the rows.
        number: of the round whose model it is.
        panel: silos asked, sorted.
        traffic: receives the bytes.
        accepted: by silo, the last round whose update was aggregated.

    Raises:
        RunError: too few silos are left to unmask the sum, fewer than the quorum, or it is impossible as one.
    """
    recipe, note = silos.recipe, Note(silos.dir.path / "masks-evaluate.json", f"{role} rows after round {number}")
    cohort, failures = tuple(note.survivors or panel), dict[str, Failure]()
    fields: Fields = {"role": role, "items": False, "rows_of": "own"}

    def asked(silo: str, masks: Fields) -> Request:
        return silos.request(silo, "evaluate", number, tensors, {**fields, "accepted": accepted.get(silo, -1), **masks})

    vectors = Vectors("evaluate", number, figures_length(recipe), figures_ring(len(cohort)), figures_agreed(recipe))
    total = aggregate(silos, note, cohort, vectors, asked, failures, traffic).total
    missed = [failures[name] for name in sorted(failures)]
    for failure in missed:
        silos.failed(number, failure)
    needed = quorum(silos.spec, len(panel))
    if len(total.survivors) < needed:
        raise RunError(
            f"only {len(total.survivors)} of {len(panel)} silos measured the model, the quorum is {needed}: "
            + reasons(missed),
            where=str(silos.dir.path),
            fix="mend the silos and continue with --resume",
        )
    counts = shown_figures(total.values, recipe)
    rows = silos.enrolled.measured_rows[role]
    try:
        check_counts(Reply("the sum", "evaluate", silos.dir.run, number, fields=counts), recipe, sum(rows.values()))
    except UpdateRefused as refusal:
        raise RunError(f"the sum of figures is impossible: {refusal.what}", where=str(silos.dir.path)) from None
    summary = summarise({"": counts})
    return {**summary, "fairness": {}, "silos": {}, "summed": len(total.survivors), "failures": failure_lines(missed)}
