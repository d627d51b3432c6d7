"""A round of training whose updates the coordinator sees only in sum: secure aggregation over the engine's exchanges.

Four exchanges in place of one, five where the coordinator may be malicious: everyone's keys; shares of everyone's
secrets, which the coordinator passes on and cannot read; the training, from which masked vectors come back and are
added up as they arrive; and the shares that take the masks off the sum. A silo that fails in between drops out, and the
round goes on with the others while enough of them are left; else it ends with an error, and a resumed run begins
another attempt with fresh keys.

Two sums over different silos of one round would tell their difference, and silos give out one only. So who is in the
sum is written down before it is unmasked, and a run that was killed after that repeats the round with these silos.

What is known of a round afterwards is who is in the sum, its mean and the mean training loss. (`fedlm.privacy.secagg`
is the protocol, `fedlm.federation.silo.masked` the silo's side.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedlm.algorithms.base import Accumulator, Place
from fedlm.errors import AggregationRefused, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.folding import FoldResult
from fedlm.federation.identities import SimulatedDirectory
from fedlm.federation.records import Traffic, reasons
from fedlm.files import read_json, write_json
from fedlm.guards import REST, shared_key
from fedlm.guards.base import parted, size_of
from fedlm.guards.mask import BESIDE, encoding, shown
from fedlm.guards.noised import NoisedEncoding
from fedlm.messages import Failure, FailureKind, Reply, Request, Tensors
from fedlm.privacy import secagg
from fedlm.privacy.accounting import spent
from fedlm.privacy.mechanisms import times
from fedlm.privacy.secagg.identity import Directory
from fedlm.privacy.secagg.message import to_fields
from fedlm.recipe.guards import mask_of
from fedlm.recipe.privacy import withheld

if TYPE_CHECKING:
    from fedlm.federation.conversations import Conversations

ADDED = ("sent_bytes", "received_bytes")
"""Fields that engines add to a reply."""


def train_masked(
    silos: Conversations,
    number: int,
    sampled: list[str],
    broadcast: Tensors,
    parameters: Tensors,
    accepted: dict[str, int],
    accumulator: Accumulator,
    traffic: Traffic,
) -> FoldResult:
    """Let silos train and add up what they send, in which none can be told apart.

    Args:
        sampled: silos asked, in canonical order.
        broadcast: what travels to be trained.
        parameters: the global model, which says what an update must look like.
        accepted: by silo, the last round whose update was aggregated.
        accumulator: receives the weighted mean, as one update of all their weight.
        traffic: receives the bytes.

    Raises:
        RunError: too few silos are left to unmask the sum, or it is impossible as one.
    """
    recipe, spec = silos.recipe, mask_of(silos.recipe)
    assert spec is not None
    failures: dict[str, Failure] = {
        name: Failure(name, FailureKind.REFUSED, "it trains a part of the adapter alone, and a sum needs all of it")
        for name in sampled
        if silos.plan(name).partial
    }
    note = _Note(silos.dir.path / "masks.json", number)
    cohort = tuple(name for name in note.survivors or sampled if name not in failures)
    place = Place(cohort[0] if cohort else "", number, silos.spec.rounds, recipe.seed, silos.rank(sampled[0]))
    shapes = dict(sorted(silos.shapes(parameters, place).items()))
    left = silos.chain.layouts(shapes)[-1] if silos.chain is not None else shapes
    length = size_of(left) + BESIDE
    how = encoding(recipe, len(cohort), length)
    attempt = note.begin()
    malicious = spec.coordinator == "malicious"
    risk = secagg.Risk(spec.dropouts, spec.corrupt, malicious=malicious)
    seed = hashlib.sha256(f"{silos.dir.run}/{number}/{attempt}".encode()).digest()
    aggregation = secagg.Coordinator(
        secagg.Parameters(
            run=silos.dir.run,
            round=number,
            attempt=attempt,
            silos=cohort,
            design=secagg.choose(len(cohort), risk),
            seed=seed,
            ring_bits=how.ring_bits,
            length=length,
            malicious=malicious,
            agreed=how.fields,
        ),
        directory_of(silos),
    )
    bytes_of: dict[str, dict[str, int]] = {name: {"sent_bytes": 0, "received_bytes": 0} for name in cohort}

    def take(answers: Iterable[Reply | Failure], keep: Callable[[str, secagg.Message], None]) -> None:
        """A phase's replies; silos whose reply is refused drop out."""
        for answer in answers:
            if isinstance(answer, Reply):
                traffic.add(answer)
                for name in ADDED:
                    bytes_of[answer.silo][name] += int(answer.fields.get(name, 0))
                try:
                    keep(answer.silo, _message(answer))
                    if answer.verb == "train":
                        silos.done(number, answer)
                    continue
                except AggregationRefused as refusal:
                    answer = Failure(answer.silo, FailureKind.BAD_UPDATE, refusal.sentence())
            failures[answer.silo] = answer

    def ask(verb: str, messages: dict[str, secagg.Message]) -> Iterable[Reply | Failure]:
        """The protocol's own verbs, which carry nothing of the model."""
        requests = (
            Request(silo, verb, silos.dir.run, number, attempt, _tensors(message), message.fields)
            for silo, message in messages.items()
        )
        return silos.engine.exchange(requests, silos.spec.deadline)

    def train(messages: dict[str, secagg.Message]) -> Iterable[Reply | Failure]:
        def requests() -> Iterable[Request]:
            for silo, message in messages.items():
                fields = {
                    "round": number,
                    "rounds": silos.spec.rounds,
                    "accepted": accepted.get(silo, -1),
                    "silos": len(sampled),  # the same in every attempt, or a silo would train again
                    "masks": to_fields(message),
                }
                yield silos.request(silo, "train", number, broadcast, fields)

        return silos.exchange(requests())

    try:
        take(ask("keys", aggregation.keys_requests()), aggregation.take_keys)
        take(ask("shares", aggregation.shares_requests()), aggregation.take_shares)
        take(train(aggregation.train_requests()), aggregation.take_masked)
        closing = aggregation.consistency_requests() if malicious else aggregation.unmask_requests()
        note.write(aggregation.survivors)
        if malicious:
            take(ask("consistency", closing), aggregation.take_consistency)
            closing = aggregation.unmask_requests()
        take(ask("unmask", closing), aggregation.take_unmask)
        total = aggregation.finish()
    except RunError as error:
        if not failures:
            raise
        why = reasons([failures[name] for name in sorted(failures)])
        raise RunError(f"{error.what} ({why})", where=error.where, fix=error.fix) from None

    means, loss, weights = shown(total.values, len(total.survivors), how)
    if silos.chain is None:
        update = parted(means, shapes)
    else:
        update = silos.chain.decode({REST: means}, shapes, shared_key(recipe.seed, number))
    accumulator.add_mean(update, float(weights), len(total.survivors))
    result = FoldResult(list(sampled), list(total.survivors), [failures[name] for name in sorted(failures)])
    result.fields = {name: dict(bytes_of[name]) for name in total.survivors}
    result.loss = None if withheld(recipe) else loss
    if isinstance(how, NoisedEncoding):  # as every silo accounts for it
        assert recipe.privacy is not None
        result.figures["epsilon"] = spent([times(how.mechanism, number + 1)], recipe.privacy.delta).epsilon
    if total.liars:
        result.figures["wrong_shares"] = total.liars
    for failure in result.failures:
        silos.failed(number, failure)
    return result


class _Note:
    """What must survive this process: the round's attempts, and whose sum was unmasked.

    Args:
        file: in the run directory.
    """

    def __init__(self, file: Path, number: int) -> None:
        self._file, self._round = file, number
        kept = read_json(file) if file.exists() else {}
        same = kept.get("round") == number
        self.attempt: int = kept["attempt"] if same else -1
        self.survivors: list[str] = kept["survivors"] if same else []

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
                f"the sum of round {self._round} was unmasked once, and may be again only with {missing} in it",
                where=str(self._file.parent),
                fix="continue with --resume when they answer, or start a new run from the last checkpoint",
            )
        self.survivors = list(survivors)
        with disk_errors(self._file.parent):
            write_json(self._file, {"round": self._round, "attempt": self.attempt, "survivors": self.survivors})


def directory_of(silos: Conversations) -> Directory:
    """What this party knows of the silos' identities: their certificates over a network, else keys from the seed."""
    known: Directory | None = getattr(silos.engine, "directory", None)
    return known or SimulatedDirectory(silos.recipe.seed)


def _message(reply: Reply) -> secagg.Message:
    fields = {name: value for name, value in reply.fields.items() if name not in ADDED}
    return secagg.Message({name: tensor.numpy() for name, tensor in reply.tensors.items()}, fields)


def _tensors(message: secagg.Message) -> Tensors:
    return {name: torch.from_numpy(array) for name, array in message.arrays.items()}
