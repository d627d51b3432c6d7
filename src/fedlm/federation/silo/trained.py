"""A silo's part in a round of training. The verb 'train'.

Request, tensors: what the algorithm's rule begins with. Fields: `accepted`, the last round that counts, and what
the recipe's methods add. Reply: the update, after the recipe's guards, and what was counted on the way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedlm.errors import RunError
from fedlm.federation.memory import peak_rss
from fedlm.federation.records import LEFT_OUT, PLANNED
from fedlm.federation.silo.refusals import RefusedError, StoppedError
from fedlm.federation.silo.selected import round_tokens
from fedlm.federation.silo.session import SiloSession, TimeBudget
from fedlm.federation.silo.state import Trained, request_key
from fedlm.guards import REST, shared_key, update_key
from fedlm.guards.base import flat
from fedlm.messages import Fields, Observe, Request, Tensors
from fedlm.privacy.clipping import clip
from fedlm.recipe.guards import mask_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.tasks import TASKS
from fedlm.training.batches import steps_per_round
from fedlm.training.flops import rates

if TYPE_CHECKING:
    from fedlm.algorithms.base import Place
    from fedlm.federation.silo.private import PrivateRound
    from fedlm.federation.silo.reference import Reference
    from fedlm.federation.silo.workbench import Workbench
    from fedlm.recipe.privacy import PrivacySpec
    from fedlm.training.encode import TokenSet
    from fedlm.training.plan import Plan

CLIP = "clip"
"""Field of the request: the largest norm of the update, where it moves from round to round."""

WITHIN = "within"
"""Field of the reply: whether the update was within it."""


def train_round(
    bench: Workbench,
    place: Place,
    plan: Plan,
    request: Request,
    digest: str,
    before: Trained | None,
    folder: Path,
    *,
    reference: Reference | None,
    budget: TimeBudget | None,
    private: PrivateRound | None,
    observe: Observe | None,
    should_stop: Callable[[], bool],
) -> Trained:
    """The reply to a request (see above), with the silo's state after it. The model must stand on the bench.

    Args:
        digest: of the request.
        before: this silo's state of the last round that counts.
        folder: where its states are kept; named in errors.
        budget: time for the round's steps; None without a limit.
        private: examples are protected in this round, by noise of the silo's own.

    Raises:
        StoppedError: nobody waits for it any longer.
        RefusedError: the request does not name the clip that it should.
        RunError: the state of the round before lacks what that round has lost, or it is damaged.
    """
    recipe, started = bench.recipe, time.monotonic()
    protected = recipe.privacy if recipe.privacy is not None and recipe.privacy.unit == "silo" else None
    bound = math.inf if protected is None else bound_of(protected, request.fields)
    moments = before.optimizer if before and recipe.training.keeps else {}
    rows = round_tokens(bench, place, request.fields.get("chosen"))
    session = SiloSession(
        bench, place, moments, observe, should_stop, plan, budget, tokens=rows, reference=reference, private=private
    )
    rule = bench.algorithm.local(request.tensors, before.rule if before else {}, place)
    outcome = rule.run(session)
    if should_stop():
        raise StoppedError
    result, tokens = outcome.result, session.tokens
    fields: Fields = {
        "examples": result.examples,
        "tokens": result.tokens,
        "target_tokens": result.target_tokens,
        "steps": result.steps,
        "loss": result.loss,
        "loss_count": result.loss_count,
        "figures": {name: list(pair) for name, pair in result.figures.items()},
        "losses": result.losses,
        "seconds": time.monotonic() - started,
        "tokens_per_second": result.tokens / result.seconds if result.seconds > 0 else 0.0,
        "rows": len(tokens),
        "row_targets": int(tokens.loss.sum()),
        "peak_rss": peak_rss(),
        "dropped": tokens.dropped,
        "cut": tokens.cut,
        **outcome.fields,
    }
    if private is not None and tokens.users is not None:
        fields["users"] = len(np.unique(tokens.users))
    fields |= _rates(bench, fields["tokens_per_second"], tokens, plan)
    if recipe.data.selection is not None:
        fields[LEFT_OUT] = tokens.left_out
    planned = steps_per_round(session.recipe.training, len(tokens))
    if plan.seconds is not None and result.steps < planned:
        fields[PLANNED] = planned
    accepted = int(request.fields["accepted"])
    update = outcome.update
    if protected is not None:
        clipped = clip(update, bound)
        update = clipped.tensors
        if protected.adaptive is not None:
            fields[WITHIN] = clipped.within
    sent, lost = _guarded(bench, update, place, before.guard if before else {}, accepted, folder)
    return Trained(request_key(request), digest, outcome.state, session.optimizer, lost, sent, fields)


def bound_of(privacy: PrivacySpec, fields: Fields) -> float:
    """The largest norm of the round's update: the recipe's, or the one that the coordinator has come to.

    Args:
        fields: of the request, or what all silos under a mask agree on.

    Raises:
        RefusedError: they name none that is above 0 and finite.
    """
    if privacy.adaptive is None:
        return privacy.clip
    bound = fields.get(CLIP)
    if isinstance(bound, bool) or not isinstance(bound, int | float) or not 0 < bound < math.inf:
        raise RefusedError("this run's clip moves from round to round, and the request does not say where it is")
    return float(bound)


def keeps_state(bench: Workbench) -> bool:
    """Whether a round's training depends on what a silo kept of an earlier one."""
    recipe, chain = bench.recipe, bench.chain
    feedback = chain is not None and chain.feedback
    return recipe.training.keeps or feedback or ALGORITHMS[recipe.federation.algorithm.name].silo_state


def _rates(bench: Workbench, tokens_per_second: float, tokens: TokenSet, plan: Plan) -> Fields:
    """Model FLOPs, of training whose operations are countable: gradients of a likelihood, over numbers that are
    stored as such."""
    recipe = bench.recipe
    counted = TASKS[recipe.task].likelihood and recipe.adapter.kind in ("lora", "ia3", "full")
    zeroth = ALGORITHMS[recipe.federation.algorithm.name].zeroth_order
    if not counted or zeroth or plan.model(recipe.model).quantise or not tokens_per_second:
        return {}
    return rates(bench.model, np.diff(tokens.offsets), tokens_per_second, plan.processes or plan.shards or 1)


def _guarded(
    bench: Workbench, update: Tensors, place: Place, errors: Tensors, accepted: int, folder: Path
) -> tuple[Tensors, Tensors]:
    """The update as it leaves the silo, and what it loses by that, for the next round.

    Args:
        errors: what was lost until the round `accepted`, the last one that counts.
    """
    chain, masks = bench.chain, mask_of(bench.recipe) is not None
    if chain is None:
        return ({REST: flat(update)[0]} if masks else update), {}
    key = update_key(place.seed, place.silo, place.round, place.dispatch)
    if masks:  # they are added up as they are, so everyone has the same places
        key = shared_key(place.seed, place.round)
    setup = ALGORITHMS[bench.recipe.federation.algorithm.name].setup_rounds
    if not chain.feedback or place.round < setup:  # what a setup round sends is sent once: nothing follows it
        return chain.encode(update, key), {}
    if accepted >= setup and not errors:
        raise RunError(
            "the error feedback of the round before is missing from this silo's state",
            where=str(folder),
            fix="restore the silo's state, or start a new run",
        )
    try:
        return chain.encode_with_feedback(update, errors, key)
    except RunError as error:
        raise RunError(error.what, where=str(folder), fix=error.fix) from None
