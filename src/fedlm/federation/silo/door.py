"""The only door into private data: a request comes in, a reply or a typed failure goes out, and never any text.

Requests are idempotent. (run, round, attempt, silo, verb) is the key: a repeat is answered from the stored reply
without training again, and the same key with other content is refused. A new attempt (the coordinator was put back to
an earlier checkpoint) with the same content also gets the stored reply, since training is deterministic; with other
content it trains again from the state named by `accepted`.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fedlm
from fedlm.algorithms.base import Place
from fedlm.errors import DataError, FedlmError, RunError, UpdateRefused
from fedlm.federation.clock import seconds_per_step
from fedlm.federation.disk import disk_errors
from fedlm.federation.memory import peak_rss
from fedlm.federation.records import LEFT_OUT, PLANNED
from fedlm.federation.silo.augmented import centres
from fedlm.federation.silo.instructions import instructed
from fedlm.federation.silo.received import Received, UnsyncedError
from fedlm.federation.silo.reference import Reference
from fedlm.federation.silo.selected import centroids, round_tokens
from fedlm.federation.silo.session import SiloSession, TimeBudget
from fedlm.federation.silo.state import StateStore, Trained, request_digest, request_key
from fedlm.federation.silo.workbench import POOLED, Workbench
from fedlm.guards import get_chain, update_key
from fedlm.messages import Failure, FailureKind, Fields, Observe, Reply, Request, Tensors
from fedlm.recipe.capacity import Capacity, lesser, parse_capacity
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.tasks import TASKS
from fedlm.training.batches import steps_per_round
from fedlm.training.encode import TokenSet
from fedlm.training.flops import rates
from fedlm.training.plan import Plan, parse_plan

log = logging.getLogger("fedlm.silo")

PROTOCOL = 1
"""Version of requests and replies; a silo refuses another one at `hello`."""

VERBS = frozenset({"hello", "train", "evaluate", "profile", "pairs", "score", "answer"})


PRIVATE = ("micro_batch_size", "gradient_checkpointing", "dtype", "quantise", "processes", "shards")
"""Parts of a plan that are the silo's own affair."""


@dataclass(frozen=True)
class Limits:
    """Of a real silo: it plans for itself, and time is real there. A simulated silo does what the request says."""

    owner: Capacity
    """What its owner's policy says."""
    run: Capacity
    """What the run's recipe says of it."""


class StoppedError(Exception):
    """The coordinator no longer waits for this reply."""


class Silo:
    """One participant: its private rows, its private state, and the verbs its owner allows.

    Args:
        bench: the model and data shared by the silos of this process.
        state_root: folder of private states; this silo uses only its own subfolder.
        allow: verbs that the owner allows; others are refused.
        observe: receives progress events without text.
        should_stop: asked between steps or batches; True abandons the request without storing anything.
        limits: of a silo that is none of a simulation.
    """

    def __init__(
        self,
        name: str,
        bench: Workbench,
        state_root: Path,
        *,
        allow: frozenset[str] = VERBS,
        observe: Observe | None = None,
        should_stop: Callable[[], bool] | None = None,
        reason: Callable[[FedlmError], str] = FedlmError.sentence,
        limits: Limits | None = None,
    ) -> None:
        self.name, self.bench, self._reason, self._limits = name, bench, reason, limits
        self._store = StateStore(state_root, name)
        down = get_chain(bench.recipe.federation.downlink.guards, feedback=True)
        self._received = Received(state_root / name, down, bench.recipe.seed)
        self._allow = allow
        self._observe = observe
        self._should_stop = should_stop or (lambda: False)

    def handle(self, request: Request) -> Reply | Failure:
        """Answer one request. Never raises for anything that happens inside; the reason holds no training text."""
        verbs: dict[str, Callable[[Request], tuple[Tensors, Fields]]] = {
            "hello": self._hello,
            "train": self._train,
            "evaluate": self._evaluate,
            "profile": self._profile,
            "pairs": self._pairs,
            "score": self._score,
            "answer": self._answer,
        }
        if request.verb not in verbs or request.verb not in self._allow:
            allowed = ", ".join(sorted(self._allow))
            return self._failure(
                FailureKind.REFUSED, f"the verb '{request.verb}' is not allowed here (allowed: {allowed})"
            )
        if request.silo != self.name:
            return self._failure(FailureKind.REFUSED, "the request names another silo")
        if request.verb == "hello" and request.fields.get("protocol", PROTOCOL) != PROTOCOL:
            return self._failure(
                FailureKind.VERSION_MISMATCH, f"this silo speaks protocol {PROTOCOL}, not {request.fields['protocol']}"
            )
        if self._observe and request.verb in ("train", "evaluate"):
            self._observe({"kind": "silo_started", "round": request.round, "silo": self.name, "verb": request.verb})
        try:
            with self.bench.lock:
                whole = self._received.complete(request)
                own = replace(whole, tensors=self.bench.begin_from(whole.tensors))
                tensors, fields = verbs[request.verb](own)
        except StoppedError:
            return self._failure(FailureKind.TIMED_OUT, "stopped: the coordinator no longer waits for this reply")
        except _RefusedError as error:
            return self._failure(FailureKind.REFUSED, str(error))
        except UnsyncedError as error:
            return self._failure(FailureKind.UNSYNCED, str(error))
        except FedlmError as error:
            return self._failure(FailureKind.ERROR, self._reason(error))
        except Exception as error:
            return self._failure(*classify(error))
        return Reply(self.name, request.verb, request.run, request.round, request.attempt, tensors, fields)

    # ---------------------------------------------------------------- verbs

    def _hello(self, request: Request) -> tuple[Tensors, Fields]:
        """Versions, row counts and what this silo does of a round: enough to enrol, nothing of the text."""
        fields: Fields = {
            "protocol": PROTOCOL,
            "versions": {"fedlm": fedlm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        if self.name == POOLED:
            data = self.bench.silo_data(self.name)
            fields["card"] = {"rows": {r: len(getattr(data, r)) for r in ("train", "validation", "test")}, "labels": {}}
        else:
            fields["card"] = self.bench.data.card(self.name)
        capacity = parse_capacity(request.fields.get("capacity"))
        if self._limits is not None:
            capacity = lesser(capacity, self._limits.owner)
        if capacity.given:
            fields["card"] = {**fields["card"], "plan": self.bench.plan(capacity).fields()}
        return {}, fields

    def _plan(self, request: Request) -> Plan:
        """What this silo does of the round, as the request says it.

        Raises:
            _RefusedError: it is no plan, or more than the silo said at `hello` that it does.
        """
        try:
            asked = parse_plan(request.fields.get("plan"), self.bench.recipe)
        except UpdateRefused as error:
            raise _RefusedError(error.what) from None
        if self._limits is None:
            return asked
        own = self.bench.plan(lesser(self._limits.run, self._limits.owner))
        if request.verb == "evaluate" and "plan" not in request.fields:
            return own
        if not asked.within(own):
            raise _RefusedError(f"asked for {asked.fields()}, and this silo does no more than {own.fields()}")
        return replace(asked, **{name: getattr(own, name) for name in PRIVATE})

    def _train(self, request: Request) -> tuple[Tensors, Fields]:
        key, digest = request_key(request), request_digest(request)
        held = self._store.load(request.run, request.round)
        if held is not None and held.digest == digest:
            return held.reply, {**held.fields, "repeated": True}
        if held is not None and held.key == key:
            raise _RefusedError(f"round {request.round} was already answered for other content under the same attempt")
        accepted = int(request.fields["accepted"])
        before = self._store.load(request.run, accepted) if accepted >= 0 else None
        if accepted >= 0 and before is None and self._keeps_state:
            raise _RefusedError(f"this silo no longer holds its state of round {accepted}")

        trained = self._train_round(request, before, key, digest)
        with disk_errors(self._store.folder, "silo's state"):
            self._store.save(request.run, request.round, trained)
        self._store.keep_only(request.run, {accepted, request.round})
        return trained.reply, trained.fields

    @property
    def _keeps_state(self) -> bool:
        """Whether a round's training depends on what this silo kept of an earlier one."""
        recipe, chain = self.bench.recipe, self.bench.chain
        feedback = chain is not None and chain.feedback
        return recipe.training.keeps or feedback or ALGORITHMS[recipe.federation.algorithm.name].silo_state

    def _train_round(self, request: Request, before: Trained | None, key: str, digest: str) -> Trained:
        recipe, bench, plan = self.bench.recipe, self.bench, self._plan(request)
        bench.load(plan.model(recipe.model))
        started = time.monotonic()
        place = self._place(request, plan)
        moments = before.optimizer if before and recipe.training.keeps else {}
        rows = round_tokens(bench, place, request.fields.get("chosen"))
        session = SiloSession(
            bench,
            place,
            moments,
            self._observe,
            self._should_stop,
            plan,
            self._budget(plan),
            tokens=rows,
            reference=self._reference(request),
        )
        rule = bench.algorithm.local(request.tensors, before.rule if before else {}, place)
        outcome = rule.run(session)
        if self._should_stop():
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
        fields |= self._rates(fields["tokens_per_second"], tokens, plan)
        if recipe.data.selection is not None:
            fields[LEFT_OUT] = tokens.left_out
        planned = steps_per_round(session.recipe.training, len(tokens))
        if plan.seconds is not None and result.steps < planned:
            fields[PLANNED] = planned
        accepted = int(request.fields["accepted"])
        sent, lost = self._guarded(outcome.update, place, before.guard if before else {}, accepted)
        return Trained(key, digest, outcome.state, session.optimizer, lost, sent, fields)

    def _rates(self, tokens_per_second: float, tokens: TokenSet, plan: Plan) -> Fields:
        """Model FLOPs, of training whose operations are countable: gradients of a likelihood, over numbers that are
        stored as such."""
        recipe = self.bench.recipe
        counted = TASKS[recipe.task].likelihood and recipe.adapter.kind in ("lora", "ia3", "full")
        zeroth = ALGORITHMS[recipe.federation.algorithm.name].zeroth_order
        if not counted or zeroth or plan.model(recipe.model).quantise or not tokens_per_second:
            return {}
        return rates(self.bench.model, np.diff(tokens.offsets), tokens_per_second, plan.processes or plan.shards or 1)

    def _guarded(self, update: Tensors, place: Place, errors: Tensors, accepted: int) -> tuple[Tensors, Tensors]:
        """The update as it leaves the silo, and what it loses by that, for the next round.

        Args:
            errors: what was lost until the round `accepted`, the last one that counts.

        Raises:
            RunError: the state of the round before lacks what that round has lost, or it is damaged.
        """
        chain = self.bench.chain
        if chain is None:
            return update, {}
        key = update_key(place.seed, place.silo, place.round, place.dispatch)
        recipe = self.bench.recipe
        setup = ALGORITHMS[recipe.federation.algorithm.name].setup_rounds
        if not chain.feedback or place.round < setup:  # what a setup round sends is sent once: nothing follows it
            return chain.encode(update, key), {}
        if accepted >= setup and not errors:
            raise RunError(
                "the error feedback of the round before is missing from this silo's state",
                where=str(self._store.folder),
                fix="restore the silo's state, or start a new run",
            )
        try:
            return chain.encode_with_feedback(update, errors, key)
        except RunError as error:
            raise RunError(error.what, where=str(self._store.folder), fix=error.fix) from None

    def _reference(self, request: Request) -> Reference | None:
        """The policy at the start of the stage; None where full training has overwritten it."""
        if self.bench.recipe.adapter.kind == "full":
            return None
        return Reference(self.bench, self._store.folder, request.run)

    def _budget(self, plan: Plan) -> TimeBudget | None:
        """The time for a round's steps: on the recipe's virtual clock in a simulation, on the real one else."""
        if plan.seconds is None:
            return None
        recipe = self.bench.recipe
        virtual = seconds_per_step(recipe.federation.speeds, recipe.seed, self.name) if self._limits is None else None
        return TimeBudget(plan.seconds, virtual)

    def _place(self, request: Request, plan: Plan) -> Place:
        recipe = self.bench.recipe
        rounds = int(request.fields.get("rounds", recipe.federation.rounds))
        dispatch = int(request.fields["dispatch"]) if "dispatch" in request.fields else None
        silos = max(1, int(request.fields.get("silos", 1)))
        return Place(self.name, request.round, rounds, recipe.seed, plan.rank, dispatch=dispatch, silos=silos)

    def _evaluate(self, request: Request) -> tuple[Tensors, Fields]:
        from fedlm.evaluation import measure

        role = request.fields["role"]
        if role not in ("validation", "test"):
            raise DataError("only the roles 'validation' and 'test' can be evaluated", where=f"role '{role}'")
        recipe, bench = self.bench.recipe, self.bench
        data = bench.silo_data(self.name)
        rows, own = getattr(data, role), request.fields.get("rows_of", "own") == "own"
        if not own:
            rows = self._others(role, len(rows))
        started = time.monotonic()
        if len(rows) == 0:
            return {}, {"examples": 0, "seconds": 0.0, "peak_rss": peak_rss()}
        plan = self._plan(request)
        bench.load(plan.model(recipe.model))
        if recipe.data.instructions is not None:
            rows, _ = bench.rows(self.name, role) if own else instructed(bench, rows)
        if request.fields.get("plain"):  # the adapter's own terms, whatever the algorithm
            bench.put(request.tensors, whole=True)
        else:
            bench.put(bench.algorithm.measured(request.tensors, self._kept(request), self._place(request, plan)))
        reference = self._reference(request)
        with self._stoppable():
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
            )
        return {}, {**counts, "seconds": time.monotonic() - started, "peak_rss": peak_rss()}

    def _profile(self, request: Request) -> tuple[Tensors, Fields]:
        """Where groups of this silo's rows lie in the model's states, to choose among rows, its own or public ones."""
        started = time.monotonic()
        self.bench.load(self._plan(request).model(self.bench.recipe.model))
        with self._stoppable():
            found = (centroids if self.bench.recipe.data.augment is None else centres)(self.bench, self.name)
        return {"centroids": found}, {"seconds": time.monotonic() - started, "peak_rss": peak_rss()}

    def _pairs(self, request: Request) -> tuple[Tensors, Fields]:
        """Counts of neighbours in this silo's words, to train a tokenizer; see `fedlm.federation.silo.pairs`."""
        data = self.bench.silo_data(self.name)
        return self.bench.pairs.answer(self.name, data.train, data.kind, request.tensors), {}

    def _score(self, request: Request) -> tuple[Tensors, Fields]:
        """How well prompts fit this silo's rows, in sums; see `fedlm.federation.silo.scored`."""
        from fedlm.federation.silo.scored import score

        self.bench.load(self._plan(request).model(self.bench.recipe.model))
        with self._stoppable():
            return score(self.bench, self._place(request, self._plan(request)), request)

    def _answer(self, request: Request) -> tuple[Tensors, Fields]:
        """Answers to questions from this silo's rows in context; see `fedlm.federation.silo.answered`."""
        from fedlm.federation.silo.answered import answer

        self.bench.load(self._plan(request).model(self.bench.recipe.model))
        with self._stoppable():
            return answer(self.bench, self.name, request)

    def _others(self, role: str, limit: int) -> Any:
        """Rows of the other silos, no more than this one has.

        Raises:
            _RefusedError: this process holds none: it is a silo's own, not a simulation of many.
        """
        rows = self.bench.data.others(self.name, role, limit, self.bench.recipe.seed)
        if limit and not len(rows):
            raise _RefusedError("no other silo's rows are here: only a simulation can measure a silo's model on them")
        return rows

    def _kept(self, request: Request) -> Tensors:
        """The private state of this silo's last round that counts, where its model is part of that.

        Raises:
            _RefusedError: the silo no longer holds it.
        """
        accepted = int(request.fields.get("accepted", -1))
        if accepted < 0 or not ALGORITHMS[self.bench.recipe.federation.algorithm.name].personal:
            return {}
        held = self._store.load(request.run, accepted)
        if held is None:
            raise _RefusedError(f"this silo no longer holds its state of round {accepted}")
        return held.rule

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Between two batches, or two tokens written, ends what nobody waits for: it would hold up the next request."""

        def look(*_: object) -> None:
            if self._should_stop():
                raise StoppedError

        hook = self.bench.model.get_input_embeddings().register_forward_pre_hook(look)  # every batch begins there
        try:
            yield
        finally:
            hook.remove()

    def _failure(self, kind: FailureKind, reason: str) -> Failure:
        return Failure(self.name, kind, reason)


class _RefusedError(Exception):
    """The request cannot be answered as it stands."""


def classify(error: Exception) -> tuple[FailureKind, str]:
    """The kind and a text-free reason of an unexpected error: its type and the place in the code, never its message."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return (
            FailureKind.OUT_OF_MEMORY,
            "out of memory; lower training.micro_batch_size or training.max_length, or use gradient_checkpointing",
        )
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    ours = [f for f in frames if "fedlm" in Path(f.filename).parts]
    via = f" (from {Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours and ours[-1] is not frames[-1] else ""
    log.error("silo error: %s%s%s", type(error).__name__, place, via)
    return FailureKind.ERROR, f"unexpected {type(error).__name__}{place}{via}"
