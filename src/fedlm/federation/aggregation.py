"""Secure aggregation over the engine's exchanges: what silos answer to one verb is seen only in sum.

Four exchanges in place of one, five where the coordinator may be malicious: everyone's keys; shares of everyone's
secrets, which the coordinator passes on and cannot read; the verb itself, from which masked vectors come back and are
added up as they arrive; and the shares that take the masks off the sum. A silo that fails in between drops out, and the
sum goes on with the others while enough of them are left; else it ends with an error, and a resumed run begins another
attempt with fresh keys.

Two sums over different silos of one thing would tell their difference, and silos give out one only. So who is in the
sum is written down before it is unmasked, and a run that was killed after that repeats it with these silos.
(`fedlm.privacy.secagg` is the protocol, `fedlm.federation.silo.masked` the silo's side.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedlm.errors import AggregationRefused, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.identities import SimulatedDirectory
from fedlm.federation.records import Traffic, reasons
from fedlm.files import read_json, write_json
from fedlm.guards.mask import MASKS, OF, risk_of
from fedlm.messages import Failure, FailureKind, Fields, Reply, Request, Tensors
from fedlm.privacy import secagg
from fedlm.privacy.secagg.identity import Directory
from fedlm.privacy.secagg.message import to_fields
from fedlm.recipe.guards import mask_of
from fedlm.recipe.schema import Recipe

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations

ADDED = ("sent_bytes", "received_bytes")
"""Fields that engines add to a reply."""

NOTED = 8
"""Sums that are noted: more than a resumed run repeats of one verb."""


@dataclass(frozen=True)
class Vectors:
    """What silos send under a mask.

    Attributes:
        verb: whose answers they are, 'train' or 'evaluate'.
        number: of the round, in requests.
        length, ring_bits, agreed: see `fedlm.privacy.secagg.Parameters`.
    """

    verb: str
    number: int
    length: int
    ring_bits: int
    agreed: Fields


@dataclass
class Summed:
    """What came of it, and by silo the bytes that travelled."""

    total: secagg.Sum
    bytes_of: dict[str, dict[str, int]]


class Note:
    """What must survive the coordinator's process: attempts, and whose sums were unmasked.

    Args:
        file: in the run directory; it has the last sums of one verb.
        of: what is added up.
        session: its number for the protocol, which never goes back; by default the last one while it is about the same
            thing, else the one after it.

    Attributes:
        survivors: who must be in the sum, since it was unmasked before; empty where it was not.
    """

    def __init__(self, file: Path, of: str, session: int | None = None) -> None:
        self._file, self._of = file, of
        kept: dict[str, Any] = read_json(file) if file.exists() else {"last": -1, "sums": []}
        self._others = [entry for entry in kept["sums"] if entry["of"] != of]
        mine = next((entry for entry in kept["sums"] if entry["of"] == of), None)
        if session is None:
            session = kept["last"] if mine is not None and mine["session"] == kept["last"] else kept["last"] + 1
        self.session: int = session
        self.attempt: int = mine["attempt"] if mine is not None and mine["session"] == session else -1
        self.survivors: list[str] = mine["survivors"] if mine is not None else []

    def begin(self) -> int:
        """The number of another attempt."""
        self.attempt += 1
        self.write(self.survivors)
        return self.attempt

    def write(self, survivors: Iterable[str]) -> None:
        """Raises RunError: sums over others were asked for before, or the disk is full."""
        if self.survivors and list(survivors) != self.survivors:
            missing = ", ".join(sorted(set(self.survivors) - set(survivors)))
            raise RunError(
                f"the sum of {self._of} was unmasked once, and may be again only with {missing} in it",
                where=str(self._file.parent),
                fix="continue with --resume when they answer, or start a new run from the last checkpoint",
            )
        self.survivors = list(survivors)
        mine = {"of": self._of, "session": self.session, "attempt": self.attempt, "survivors": self.survivors}
        with disk_errors(self._file.parent):
            write_json(self._file, {"last": self.session, "sums": [*self._others[1 - NOTED :], mine]})


def not_summed(recipe: Recipe, silos: int) -> str:
    """Why what so many silos say cannot be added up under the recipe's masks; empty where it can, or there are none."""
    if (spec := mask_of(recipe)) is None:
        return ""
    try:
        secagg.choose(silos, risk_of(spec))
    except RunError as error:
        return error.what
    return ""


def aggregate(
    silos: Conversations,
    note: Note,
    cohort: tuple[str, ...],
    vectors: Vectors,
    asked: Callable[[str, Fields], Request],
    failures: dict[str, Failure],
    traffic: Traffic,
) -> Summed:
    """The sum of what a cohort's silos answer.

    Args:
        cohort: silos asked, sorted.
        asked: a silo's request, with these fields added.
        failures: receives those of silos that drop out, by name.
        traffic: receives the bytes.

    Raises:
        RunError: too few silos are left to unmask the sum, or it is impossible as one.
    """
    spec = mask_of(silos.recipe)
    assert spec is not None
    attempt, number, malicious = note.begin(), vectors.number, spec.coordinator == "malicious"
    named = "" if vectors.verb == "train" else f"{vectors.verb}/"
    seed = hashlib.sha256(f"{silos.dir.run}/{named}{note.session}/{attempt}".encode()).digest()
    aggregation = secagg.Coordinator(
        secagg.Parameters(
            run=silos.dir.run,
            round=note.session,
            attempt=attempt,
            silos=cohort,
            design=secagg.choose(len(cohort), risk_of(spec)),
            seed=seed,
            ring_bits=vectors.ring_bits,
            length=vectors.length,
            malicious=malicious,
            agreed=vectors.agreed,
        ),
        directory_of(silos),
    )
    bytes_of: dict[str, dict[str, int]] = {name: dict.fromkeys(ADDED, 0) for name in cohort}

    def take(answers: Iterable[Reply | Failure], keep: Callable[[str, secagg.Message], None]) -> None:
        """A phase's replies; silos whose reply is refused drop out."""
        for answer in answers:
            if isinstance(answer, Reply):
                traffic.add(answer)
                for name in ADDED:
                    bytes_of[answer.silo][name] += int(answer.fields.get(name, 0))
                try:
                    keep(answer.silo, _message(answer))
                    if answer.verb == vectors.verb:
                        silos.done(number, answer)
                    continue
                except AggregationRefused as refusal:
                    answer = Failure(answer.silo, FailureKind.BAD_UPDATE, refusal.sentence())
            failures[answer.silo] = answer

    def ask(verb: str, messages: dict[str, secagg.Message]) -> Iterable[Reply | Failure]:
        """The protocol's own verbs, which carry nothing of the model."""
        of = {} if vectors.verb == "train" else {OF: vectors.verb}
        requests = (
            Request(silo, verb, silos.dir.run, number, attempt, _tensors(message), {**message.fields, **of})
            for silo, message in messages.items()
        )
        return silos.engine.exchange(requests, silos.spec.deadline)

    def answers(messages: dict[str, secagg.Message]) -> Iterable[Reply | Failure]:
        return silos.exchange(asked(silo, {MASKS: to_fields(message)}) for silo, message in messages.items())

    try:
        take(ask("keys", aggregation.keys_requests()), aggregation.take_keys)
        take(ask("shares", aggregation.shares_requests()), aggregation.take_shares)
        take(answers(aggregation.train_requests()), aggregation.take_masked)
        closing = aggregation.consistency_requests() if malicious else aggregation.unmask_requests()
        note.write(aggregation.survivors)
        if malicious:
            take(ask("consistency", closing), aggregation.take_consistency)
            closing = aggregation.unmask_requests()
        take(ask("unmask", closing), aggregation.take_unmask)
        return Summed(aggregation.finish(), bytes_of)
    except RunError as error:
        if not failures:
            raise
        why = reasons([failures[name] for name in sorted(failures)])
        raise RunError(f"{error.what} ({why})", where=error.where, fix=error.fix) from None


def directory_of(silos: Conversations) -> Directory:
    """What this party knows of the silos' identities: their certificates over a network, else keys from the seed."""
    known: Directory | None = getattr(silos.engine, "directory", None)
    return known or SimulatedDirectory(silos.recipe.seed)


def _message(reply: Reply) -> secagg.Message:
    fields = {name: value for name, value in reply.fields.items() if name not in ADDED}
    return secagg.Message({name: tensor.numpy() for name, tensor in reply.tensors.items()}, fields)


def _tensors(message: secagg.Message) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in message.arrays.items()}
