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
from datetime import UTC, datetime
from pathlib import Path

import torch

import fedlm
from fedlm.algorithms.base import Place
from fedlm.errors import FedlmError, UpdateRefused
from fedlm.federation.clock import seconds_per_step
from fedlm.federation.disk import disk_errors
from fedlm.federation.identities import Identity, simulated
from fedlm.federation.memory import peak_rss
from fedlm.federation.silo.augmented import centres
from fedlm.federation.silo.leaving import quiet, told, told_of_rows, without_noise
from fedlm.federation.silo.masked import VERBS as MASK_VERBS
from fedlm.federation.silo.masked import Masked, serves
from fedlm.federation.silo.measured import held_out, measured
from fedlm.federation.silo.private import PrivateRound
from fedlm.federation.silo.received import Received, UnsyncedError
from fedlm.federation.silo.reference import Reference
from fedlm.federation.silo.refusals import RefusedError, StoppedError
from fedlm.federation.silo.selected import centroids
from fedlm.federation.silo.session import TimeBudget
from fedlm.federation.silo.state import StateStore, Trained, request_digest, request_key, tensors_digest
from fedlm.federation.silo.sums import Sums, model_hash
from fedlm.federation.silo.token_ledger import TokenBudget
from fedlm.federation.silo.trained import keeps_state, train_round
from fedlm.federation.silo.workbench import POOLED, Workbench
from fedlm.guards import get_chain
from fedlm.guards.mask import MASKS
from fedlm.messages import Failure, FailureKind, Fields, Observe, Reply, Request, Tensors
from fedlm.privacy.calibration import check_budget
from fedlm.recipe.capacity import Capacity, lesser, parse_capacity
from fedlm.recipe.guards import mask_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.privacy import by_user, noised_in_training, withheld
from fedlm.training.plan import Plan, parse_plan

log = logging.getLogger("fedlm.silo")

PROTOCOL = 1
"""Version of requests and replies; a silo refuses another one at `hello`."""

VERBS = frozenset({"hello", "train", "evaluate", "profile", "pairs", "score", "answer"})
"""What an owner allows or not; the verbs of secure aggregation go with `train`, or with `evaluate`."""


PRIVATE = ("micro_batch_size", "gradient_checkpointing", "dtype", "quantise", "processes", "shards")
"""Parts of a plan that are the silo's own affair."""


@dataclass(frozen=True)
class Limits:
    """Of a real silo: it plans for itself, and time is real there. A simulated silo does what the request says."""

    owner: Capacity
    """What its owner's policy says."""
    run: Capacity
    """What the run's recipe says of it."""


class Silo:
    """One participant: its private rows, its private state, and the verbs its owner allows.

    Args:
        bench: the model and data shared by the silos of this process.
        state_root: folder of private states; this silo uses only its own subfolder.
        allow: verbs that the owner allows; others are refused.
        observe: receives progress events without text.
        should_stop: asked between steps or batches; True abandons the request without storing anything.
        limits: of a silo that is none of a simulation.
        identity: by which it signs its keys of secure aggregation; in a simulation one that follows from the seed.
        cohort: silos that a sum must be over before this one helps to unmask it.
        apart: silos by which the cohorts of two sums from one model must differ, unless they are the same.
        tokens: what noise on text may cost; by default whatever a recipe asks for.

    Attributes:
        refused_by: the line of the owner's policy that the last request was refused by, where it was one's doing.
    """

    refused_by: str | None = None

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
        identity: Identity | None = None,
        cohort: int = 3,
        apart: int = 2,
        tokens: TokenBudget | None = None,
    ) -> None:
        self._tokens = tokens or TokenBudget(None, "run", datetime.now(UTC).date())
        self._identity, self._cohort, self._apart = identity, cohort, apart
        self.name, self.bench, self._reason, self._limits = name, bench, reason, limits
        self._store = StateStore(state_root, name)
        down = get_chain(bench.recipe.federation.downlink.guards, feedback=True)
        self._received = Received(state_root / name, down, bench.recipe.seed)
        self._allow = allow
        hidden = mask_of(bench.recipe) is not None or withheld(bench.recipe)
        self._observe = quiet(observe) if observe is not None and hidden else observe
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
            **dict.fromkeys(MASK_VERBS, self._masks),
        }
        if request.verb not in verbs or serves(request) not in self._allow:
            allowed = ", ".join(sorted(self._allow))
            return self._failure(
                FailureKind.REFUSED, f"the verb '{request.verb}' is not allowed here (allowed: {allowed})"
            )
        if reason := without_noise(self.bench.recipe, serves(request)):
            return self._failure(FailureKind.REFUSED, reason)
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
                if request.verb not in MASK_VERBS:
                    request = self._received.complete(request)
                    request = replace(request, tensors=self.bench.begin_from(request.tensors))
                tensors, fields = verbs[request.verb](request)
        except StoppedError:
            return self._failure(FailureKind.TIMED_OUT, "stopped: the coordinator no longer waits for this reply")
        except RefusedError as error:
            self.refused_by = error.line
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
            if by_user(self.bench.recipe):
                fields["card"] = {**fields["card"], "users": self.bench.data.users(self.name)}
        fields["card"] = told_of_rows(fields["card"], self.bench.recipe)
        if (private := self.bench.recipe.privacy) is not None and noised_in_training(self.bench.recipe):
            units = fields["card"].get("users", fields["card"]["rows"]["train"])
            check_budget(private.epsilon, private.delta, max(1, int(units)))
        capacity = parse_capacity(request.fields.get("capacity"))
        if self._limits is not None:
            capacity = lesser(capacity, self._limits.owner)
        if capacity.given:
            fields["card"] = {**fields["card"], "plan": self.bench.plan(capacity).fields()}
        return {}, fields

    def _plan(self, request: Request) -> Plan:
        """What this silo does of the round, as the request says it.

        Raises:
            RefusedError: it is no plan, or more than the silo said at `hello` that it does.
        """
        try:
            asked = parse_plan(request.fields.get("plan"), self.bench.recipe)
        except UpdateRefused as error:
            raise RefusedError(error.what) from None
        if self._limits is None:
            return asked
        own = self.bench.plan(lesser(self._limits.run, self._limits.owner))
        if request.verb == "evaluate" and "plan" not in request.fields:
            return own
        if not asked.within(own):
            raise RefusedError(f"asked for {asked.fields()}, and this silo does no more than {own.fields()}")
        return replace(asked, **{name: getattr(own, name) for name in PRIVATE})

    def _train(self, request: Request) -> tuple[Tensors, Fields]:
        if mask_of(self.bench.recipe) is None:
            update, fields = self._trained(request)
            return update, told(fields, self.bench.recipe)
        masked = self._masked("train")
        masked.accept(request, self._model_of(request, "train"))
        update, fields = self._trained(replace(request, fields={k: v for k, v in request.fields.items() if k != MASKS}))
        return masked.send(request, update, fields)

    def _masks(self, request: Request) -> tuple[Tensors, Fields]:
        """What secure aggregation asks before and after a round's training, or a measurement."""
        return self._masked(serves(request)).answer(request)

    def _masked(self, verb: str) -> Masked:
        """This silo's part in a sum of what it answers to a verb."""
        recipe = self.bench.recipe
        identity = self._identity or simulated(recipe.seed, self.name)
        folder, simulation = self._store.folder, self._limits is None
        sums = Sums(folder, self._apart)
        return Masked(self.name, recipe, folder, identity, self._cohort, sums, verb, simulated=simulation)

    def _model_of(self, request: Request, purpose: str) -> str:
        """Hash of what a request lets be computed from: the base model, the run's start, and what it sends."""
        from fedlm.models.fingerprint import fingerprint

        base = fingerprint(self.bench.recipe.model)["weights"]
        return model_hash(purpose, base, *(tensors_digest(part) for part in (self.bench.start, request.tensors)))

    def _trained(self, request: Request) -> tuple[Tensors, Fields]:
        """The update, trained or kept, as its guards leave it, and what was counted."""
        key, digest = request_key(request), request_digest(request)
        held = self._store.load(request.run, request.round)
        private = self._private(request, digest)
        if held is not None and held.digest == digest:
            if private is not None:
                private.charge(held.reply, self._units(held))
            return held.reply, {**held.fields, "repeated": True}
        if held is not None and held.key == key:
            raise RefusedError(f"round {request.round} was already answered for other content under the same attempt")
        accepted = int(request.fields["accepted"])
        before = self._store.load(request.run, accepted) if accepted >= 0 else None
        if accepted >= 0 and before is None and keeps_state(self.bench):
            raise RefusedError(f"this silo no longer holds its state of round {accepted}")

        plan = self._plan(request)
        self.bench.load(plan.model(self.bench.recipe.model))
        trained = train_round(
            self.bench,
            self._place(request, plan),
            plan,
            request,
            digest,
            before,
            self._store.folder,
            reference=self._reference(request),
            budget=self._budget(plan),
            private=private,
            observe=self._observe,
            should_stop=self._should_stop,
        )
        with disk_errors(self._store.folder, "silo's state"):
            self._store.save(request.run, request.round, trained)
        self._store.keep_only(request.run, {accepted, request.round})
        if private is not None:  # what is stored may leave once it is paid for
            private.charge(trained.reply, self._units(trained))
        return trained.reply, trained.fields

    def _units(self, trained: Trained) -> int:
        """Of how many rows, or users, an update was made."""
        return int(trained.fields["users" if by_user(self.bench.recipe) else "rows"])

    def _reference(self, request: Request) -> Reference | None:
        """The policy at the start of the stage; None where full training has overwritten it."""
        if self.bench.recipe.adapter.kind == "full":
            return None
        return Reference(self.bench, self._store.folder, request.run)

    def _private(self, request: Request, digest: str) -> PrivateRound | None:
        """Where the recipe protects examples, or users."""
        recipe = self.bench.recipe
        if not noised_in_training(recipe):
            return None
        return PrivateRound(recipe, request, self._store.folder, digest, simulated=self._limits is None)

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
        if mask_of(self.bench.recipe) is None:
            return {}, self._measured(request)
        if request.fields.get("rows_of", "own") != "own" or any(request.fields.get(n) for n in ("items", "plain")):
            raise RefusedError("this run's figures leave only in sums over silos, of the run's models on own rows")
        masked = self._masked("evaluate")
        masked.accept(request, self._model_of(request, str(request.fields["role"])))
        return masked.send_figures(request, self._measured(request))

    def _measured(self, request: Request) -> Fields:
        """Sums and counts over held-out rows, of a model."""
        rows = held_out(self.bench, self.name, request)
        if len(rows) == 0:
            return {"examples": 0, "seconds": 0.0, "peak_rss": peak_rss()}
        plan = self._plan(request)
        self.bench.load(plan.model(self.bench.recipe.model))
        kept = {} if request.fields.get("plain") else self._kept(request)
        reference, place = self._reference(request), self._place(request, plan)
        stoppable = self._stoppable()
        return measured(self.bench, place, plan, request, rows, kept, reference=reference, stoppable=stoppable)

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
            folder, simulation = self._store.folder, self._limits is None
            return answer(self.bench, self.name, request, folder, self._tokens, simulated=simulation)

    def _kept(self, request: Request) -> Tensors:
        """The private state of this silo's last round that counts, where its model is part of that.

        Raises:
            RefusedError: the silo no longer holds it.
        """
        accepted = int(request.fields.get("accepted", -1))
        if accepted < 0 or not ALGORITHMS[self.bench.recipe.federation.algorithm.name].personal:
            return {}
        held = self._store.load(request.run, accepted)
        if held is None:
            raise RefusedError(f"this silo no longer holds its state of round {accepted}")
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
