"""A real silo: its owner's policy, text and state, serving the runs that a coordinator proposes.

In a simulation the engine knows recipe and data. Here the recipe arrives with `hello`, and the silo decides: versions
first (before anything of the recipe is read), then the policy, then whether model and text are what the run needs.
What was agreed is written down, so a restarted worker goes on without being greeted again. Everything after that goes
through `Silo`, the same door as in a simulation.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fedlm
from fedlm.errors import FedlmError, RecipeError
from fedlm.federation.api import MAY_CHANGE
from fedlm.federation.identities import Identity
from fedlm.federation.silo import agreements, auditlog
from fedlm.federation.silo.agreements import RUN, Agreement
from fedlm.federation.silo.audited import audited
from fedlm.federation.silo.auditlog import AuditLog
from fedlm.federation.silo.door import Limits, Silo, classify
from fedlm.federation.silo.holdings import load_holdings
from fedlm.federation.silo.hours import local_day
from fedlm.federation.silo.masked import serves
from fedlm.federation.silo.policy import (
    check_counting,
    check_hours,
    check_recipe,
    check_request,
    check_rows,
    check_verb,
    load_policy,
    local_model,
)
from fedlm.federation.silo.privacy_rules import epsilon
from fedlm.federation.silo.refusals import Forbidden
from fedlm.federation.silo.spent import Spent, check_bytes
from fedlm.federation.silo.token_ledger import TokenBudget
from fedlm.federation.silo.versions import SCHEMA, MismatchError, check_fingerprint, check_versions, compatible
from fedlm.federation.silo.workbench import Workbench
from fedlm.messages import Failure, FailureKind, Fields, Observe, Reply, Request
from fedlm.recipe.capacity import Capacity, lesser, parse_capacity
from fedlm.recipe.guards import mask_of
from fedlm.recipe.load import InvalidRecipeError, build_recipe, diff_recipes, digest_of
from fedlm.recipe.schema import Recipe
from fedlm.recipe.yamltree import Tree, check_plain

log = logging.getLogger("fedlm.silo")

RUNS_HELD = 2
"""Runs whose encoded rows stay in memory; others are read again from their agreement when they are asked for."""

COUNTING = "tokenizer"
"""The `purpose` of a greeting that asks for counts of pairs and for nothing else; there is no model then."""

NOT_AGREED = "this silo has not agreed to this run; the coordinator must greet it first"


class OwnSilo:
    """One organisation's participant.

    Args:
        name: its name in the network; requests to other names are refused.
        state_root: folder of private states and agreements; only the subfolder of this name is used.
        data_file: describes the silo's text (see `Holdings`).
        policy_file: what the owner allows.
        observe: receives progress events without text.
        identity: by which it signs its keys of secure aggregation, and what it knows of others'; without one it takes
            no part in that.

    Raises:
        RecipeError: the data file or the policy cannot be read or asks for something impossible; or the policy
            insists on users, and the data file does not say whose a row is.
    """

    def __init__(
        self,
        name: str,
        state_root: Path,
        data_file: Path,
        policy_file: Path,
        observe: Observe | None = None,
        identity: Identity | None = None,
    ) -> None:
        self.name, self._identity = name, identity
        self.policy = load_policy(policy_file)
        self._text = load_holdings(data_file)
        if self.policy.privacy.unit == "user":
            self._text.check_users()
        self._states = state_root
        self._observe = observe
        self._spent, self._log = Spent(self._folder), AuditLog(self._folder / auditlog.FILE)
        self._lock = threading.RLock()
        self._runs: OrderedDict[str, tuple[Agreement, Workbench]] = OrderedDict()
        self._standing: Workbench | None = None
        """The bench where the model stands: there is one model at most."""

    def handle(
        self, request: Request, observe: Observe | None = None, should_stop: Callable[[], bool] | None = None
    ) -> Reply | Failure:
        """Answer one request; one at a time. Never raises for anything that happens inside.

        Args:
            observe: receives this request's progress events, in place of the silo's own observer.
            should_stop: asked between optimiser steps; True abandons the request without storing anything.
        """
        answer, line = self._answer(request, observe, should_stop)
        try:
            self._log.append(audited(request, answer, line, self._digest_of(request)))
        except FedlmError as error:  # what is not written down does not leave
            return self._refuse(request, FailureKind.ERROR, outside(error))
        return answer

    def _answer(
        self, request: Request, observe: Observe | None, should_stop: Callable[[], bool] | None
    ) -> tuple[Reply | Failure, str | None]:
        """The answer, and the line of the policy that refused it, where one did."""
        try:
            if request.silo != self.name:
                raise Forbidden("the request names another silo")
            check_verb(self.policy, serves(request))
            if not RUN.fullmatch(request.run):
                raise Forbidden("the run has no proper name")
            check_hours(self.policy, now())
            if request.verb == "hello":
                check_versions(request.fields)
            with self._lock:
                if should_stop is not None and should_stop():
                    reason = "stopped before it began: nobody waits for it"
                    return Failure(self.name, FailureKind.TIMED_OUT, reason), None
                if request.verb == "hello":
                    return self._leaving(request, self._hello(request)), None
                bench, capacity = self._agreed(request.run)
                check_request(self.policy, bench.recipe, request)
                if self._counts(request.run) != (request.verb == "pairs"):
                    raise Forbidden("this is not what this silo has agreed to for this run")
                self._spent.train(self.policy, request, local_day(self.policy.timezone, now()))
                if request.verb != "pairs":
                    self._set_up(bench)
                door = self._door(bench, capacity, observe, should_stop)
                answer = door.handle(request)
                if isinstance(answer, Failure):
                    answer = self._refuse(request, answer.kind, answer.reason)
                return self._leaving(request, answer), door.refused_by
        except MismatchError as mismatch:
            return self._refuse(request, FailureKind.VERSION_MISMATCH, str(mismatch)), None
        except Forbidden as refusal:
            return self._refuse(request, FailureKind.REFUSED, str(refusal)), refusal.line
        except FedlmError as error:
            return self._refuse(request, FailureKind.ERROR, outside(error)), None
        except Exception as error:
            return self._refuse(request, *classify(error)), None

    def _leaving(self, request: Request, answer: Reply | Failure) -> Reply | Failure:
        """The answer, if so much may leave. Raises Forbidden."""
        if isinstance(answer, Reply):
            self._spent.leave(self.policy, request, answer)
        return answer

    def _digest_of(self, request: Request) -> str | None:
        """Of the recipe that a request is about, as `recipe_hash` makes it of one that was sent complete."""
        if request.verb == "hello":
            sent = request.fields.get("recipe")
            return digest_of(sent) if isinstance(sent, dict) else None
        held = self._runs.get(request.run)
        return None if held is None else digest_of(held[0].recipe)

    # ---------------------------------------------------------------- agreeing

    def _hello(self, request: Request) -> Reply | Failure:
        """Agree to a run, or to an agreed one again, and answer with versions, counts and the model's fingerprint."""
        recipe = parse_recipe(request.fields.get("recipe"))
        if self._identity is None and mask_of(recipe) is not None:
            raise Forbidden("this silo has no certificate to sign its keys with, and this run's updates are masked")
        counting = request.fields.get("purpose") == COUNTING
        (check_counting if counting else check_recipe)(self.policy, recipe)
        known = agreements.load(self._folder, request.run)
        if known is not None:
            _same_run(parse_recipe(known.recipe), recipe)
        capacity = parse_capacity(request.fields.get("capacity"))
        if counting:
            bench, agreement = self._prepare_counting(request.run, recipe)
        else:
            bench, agreement = self._prepare(request.run, recipe, request.fields.get("model"), capacity)
        if known is not None:
            _same_content(known, agreement)
        answer = self._door(bench, capacity, None, None).handle(request)
        if isinstance(answer, Failure):
            return self._refuse(request, answer.kind, answer.reason)
        if not counting:
            self._spent.agree(self.policy, request.run, epsilon(recipe), local_day(self.policy.timezone, now()))
        agreements.save(self._folder, agreement)
        self._hold(agreement, bench)
        card = answer.fields["card"] if self.policy.share_labels else {**answer.fields["card"], "labels": {}}
        fields: Fields = {**answer.fields, "schema": SCHEMA, "card": card, "model": agreement.model}
        return Reply(self.name, "hello", request.run, request.round, request.attempt, {}, fields)

    def _agreed(self, run: str) -> tuple[Workbench, Capacity]:
        """The bench of a run that this silo has agreed to, and what the run says that this silo can do, as remembered
        or as written down.

        Raises:
            Forbidden: it has not, or the policy or the text has changed so that the agreement no longer holds.
        """
        if run in self._runs:
            self._runs.move_to_end(run)
            held, bench = self._runs[run]
            return bench, parse_capacity(held.capacity)
        agreement = agreements.load(self._folder, run)
        if agreement is None:
            raise Forbidden(NOT_AGREED)
        if not compatible(agreement.fedlm, fedlm.__version__):
            raise MismatchError(
                f"this silo agreed to the run with fedlm {agreement.fedlm} and now has fedlm {fedlm.__version__}"
            )
        recipe = parse_recipe(agreement.recipe)
        capacity = parse_capacity(agreement.capacity)
        if agreement.model:
            check_recipe(self.policy, recipe)
            bench, now = self._prepare(run, recipe, agreement.model, capacity)
        else:
            check_counting(self.policy, recipe)
            bench, now = self._prepare_counting(run, recipe)
        _same_content(agreement, now)
        self._hold(agreement, bench)
        return bench, capacity

    def _prepare(self, run: str, recipe: Recipe, model: Any, capacity: Capacity) -> tuple[Workbench, Agreement]:
        """The bench for a recipe, with its model on it, and what there would be to agree to.

        Args:
            model: the coordinator's fingerprint of it, or None where it gave none.
            capacity: what the run says that this silo can do.

        Raises:
            MismatchError: this silo's model is another one.
            Forbidden: the text does not fit or is too little.
        """
        from fedlm.models.fingerprint import fingerprint

        spec = local_model(self.policy, recipe.model)
        check_bytes(self.policy, recipe.model_copy(update={"model": spec}))
        ours = fingerprint(spec)
        if model is not None:
            check_fingerprint(model, ours)
        weights = lesser(capacity, self.policy.capacity).given  # the type of the weights here, if it is another
        spec = spec.model_copy(update={n: weights[n] for n in ("dtype", "quantise") if n in weights})
        here = self._text.recipe_for(recipe, self.name).model_copy(update={"model": spec})
        data = self._text.load(here, self.name)
        agreement = Agreement(
            run, fedlm.__version__, recipe.model_dump(mode="json"), ours, data.fingerprint, capacity.given
        )
        held = self._runs.get(run)
        same = held is not None and held[1].recipe == here and held[0].data == agreement.data
        bench = held[1] if held is not None and same else Workbench(here, data)
        self._set_up(bench)
        rows = data.card(self.name)["rows"]["train"]
        limited = self.policy.max_steps_per_round is not None
        more = recipe.data.augment.rows if recipe.data.augment is not None else 0
        check_rows(self.policy, here, rows, len(bench.training_tokens(self.name)) + more if limited else None)
        return bench, agreement

    def _prepare_counting(self, run: str, recipe: Recipe) -> tuple[Workbench, Agreement]:
        """The bench for counting pairs, without a model, and what there would be to agree to.

        Raises:
            Forbidden: the text does not fit or is too little.
        """
        here = self._text.recipe_for(recipe, self.name)
        data = self._text.load(here, self.name)
        check_rows(self.policy, here, data.card(self.name)["rows"]["train"], None)
        agreement = Agreement(run, fedlm.__version__, recipe.model_dump(mode="json"), {}, data.fingerprint)
        held = self._runs.get(run)
        same = held is not None and held[1].recipe == here and held[0] == agreement
        return (held[1] if held is not None and same else Workbench(here, data)), agreement

    def _counts(self, run: str) -> bool:
        """Whether a run that this silo has agreed to asks for counts of pairs alone."""
        return not self._runs[run][0].model

    # ---------------------------------------------------------------- the bench

    def _hold(self, agreement: Agreement, bench: Workbench) -> None:
        self._runs[agreement.run] = (agreement, bench)
        self._runs.move_to_end(agreement.run)
        while len(self._runs) > RUNS_HELD:
            self._runs.popitem(last=False)

    def _set_up(self, bench: Workbench) -> None:
        """Make the model stand on this bench: as it is, taken over from another run's bench, or loaded."""
        if self._standing is not None and self._standing is not bench and not bench.take_over(self._standing):
            self._standing.unload()
        self._standing = bench
        bench.load()

    def _door(
        self,
        bench: Workbench,
        capacity: Capacity,
        observe: Observe | None,
        should_stop: Callable[[], bool] | None,
    ) -> Silo:
        privacy = self.policy.privacy
        return Silo(
            self.name,
            bench,
            self._states,
            allow=frozenset(self.policy.allow),
            observe=observe or self._observe,
            should_stop=should_stop,
            reason=outside,
            limits=Limits(self.policy.capacity, capacity),
            identity=self._identity,
            cohort=max(3, self.policy.min_cohort),
            apart=self.policy.min_cohort_difference,
            tokens=TokenBudget(privacy.max_token_epsilon, privacy.per, local_day(self.policy.timezone, now())),
        )

    @property
    def _folder(self) -> Path:
        return self._states / self.name

    def _refuse(self, request: Request, kind: FailureKind, reason: str) -> Failure:
        log.warning("%s: '%s' of run %s: %s: %s", self.name, request.verb[:40], request.run[:200], kind.value, reason)
        return Failure(self.name, kind, reason)


def now() -> datetime:
    """This moment."""
    return datetime.now(UTC)


def outside(error: FedlmError) -> str:
    """What the coordinator is told of a fault here; the rest, which may name files of this silo, goes to its log."""
    log.error("%s", error.sentence())
    return f"{error.what}; the silo's log says where" if error.where or error.fix else error.what


def parse_recipe(data: Any) -> Recipe:
    """A recipe as it came over the network.

    Raises:
        Forbidden: it is missing or not valid here; says which fields.
    """
    if not isinstance(data, dict):
        raise Forbidden("the greeting holds no recipe")
    try:
        check_plain(data, "the recipe")
    except RecipeError as error:
        raise Forbidden(error.sentence()) from None
    try:
        return build_recipe(Tree(data))
    except InvalidRecipeError as error:
        told = "; ".join(problem.removeprefix("recipe: ") for problem in error.problems)
        raise Forbidden(f"the recipe is not valid here: {told[:1000]}") from None


def _same_run(before: Recipe, now: Recipe) -> None:
    changes = [c for c in diff_recipes(before, now) if not c.startswith(MAY_CHANGE)]
    if changes:
        raise Forbidden(f"this silo agreed to another recipe for this run: {'; '.join(changes)[:1000]}")


def _same_content(before: Agreement, now: Agreement) -> None:
    if bool(before.model) != bool(now.model):
        raise Forbidden("this silo agreed to this run for another purpose")
    if before.model != now.model:
        check_fingerprint(before.model, now.model)
    if before.data != now.data:
        raise Forbidden("this silo's rows have changed since it agreed to this run; it can take part in a new one")
