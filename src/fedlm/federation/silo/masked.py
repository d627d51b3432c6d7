"""A silo's part in secure aggregation, at its door: the verbs `keys`, `shares`, `consistency` and `unmask`, and what
`train` and `evaluate` send under a mask.

What a silo has given out must never be forgotten, so its state is on disk before a reply leaves: a file for each run
and verb, `<root>/<silo>/<run>/masks.json` and `masks-evaluate.json`, with secrets in it (0600). The update itself stays
in the silo's state as every reply does; what leaves is the masked vector and no figure of the round.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from fedlm.errors import AggregationRefused
from fedlm.federation.disk import disk_errors
from fedlm.federation.identities import Identity
from fedlm.federation.silo.private import LEDGER
from fedlm.federation.silo.refusals import RefusedError
from fedlm.federation.silo.secret import secret_of
from fedlm.federation.silo.state import tensors_digest
from fedlm.federation.silo.sums import Sums
from fedlm.federation.silo.trained import WITHIN, bound_of
from fedlm.files import sync_folder
from fedlm.guards import REST
from fedlm.guards.mask import BESIDE, MASKS, OF, encoding, hidden, risk_of, weight_under
from fedlm.guards.noised import NoisedEncoding, hidden_noised, least_survivors
from fedlm.guards.summed import figures_agreed, figures_length, figures_ring, hidden_figures
from fedlm.messages import Fields, Request, Tensors
from fedlm.privacy import secagg
from fedlm.privacy.ledger import Budget, Event, Ledger
from fedlm.privacy.secagg.message import Words, from_fields
from fedlm.privacy.secagg.state import from_bytes, to_bytes
from fedlm.privacy.stream import SecretStream
from fedlm.recipe.guards import mask_of
from fedlm.recipe.privacy import noised_by_silos, withheld
from fedlm.recipe.schema import Recipe

VERBS = ("keys", "shares", "consistency", "unmask")
"""Of the protocol alone; whoever may ask a silo to train under masks may ask these."""


def serves(request: Request) -> str:
    """The verb that a request is a part of: one of the protocol's own belongs to that whose answers are added up."""
    if request.verb not in VERBS:
        return request.verb
    return "evaluate" if request.fields.get(OF) == "evaluate" else "train"


class Masked:
    """One silo.

    Args:
        name: the silo's.
        recipe: of the run.
        folder: its private folder.
        identity: its own, and what it knows of the others'.
        minimum: silos that a sum must be over.
        sums: that this silo has helped to unmask, in whatever run.
        verb: 'train' or 'evaluate', whose answers are added up.
        simulated: noise comes from a test key.
    """

    def __init__(
        self,
        name: str,
        recipe: Recipe,
        folder: Path,
        identity: Identity,
        minimum: int,
        sums: Sums,
        verb: str,
        *,
        simulated: bool,
    ) -> None:
        spec = mask_of(recipe)
        if spec is None:
            raise RefusedError("this run's updates are not masked")
        self._recipe, self._spec, self._folder = recipe, spec, folder
        self._name, self._identity, self._minimum, self._simulated = name, identity, minimum, simulated
        self._sums, self._verb = sums, verb

    def answer(self, request: Request) -> tuple[Tensors, Fields]:
        """One of `VERBS`.

        Raises:
            RefusedError: the protocol forbids an answer.
        """
        message = received(request)
        try:
            if request.verb == "keys":
                self._agrees(message)
                state, answer = self._silo(len(message.fields["silos"])).keys(self._load(request.run), message)
            else:
                state = self._state(request)
                phase = getattr(self._silo(len(state.parameters.silos)), request.verb)
                state, answer = phase(state, message)
        except AggregationRefused as refusal:
            raise RefusedError(refusal.sentence()) from None
        if request.verb == "unmask":
            self._sums.add(self._session(request.run), _when(state), state.survivors)
        self._save(request.run, state)
        return sent(answer)

    def accept(self, request: Request, model: str) -> None:
        """What of a masked verb can be refused before there is anything to mask.

        Args:
            model: hash of what is trained from, or measured.

        Raises:
            RefusedError: the protocol forbids an answer, or the owner, because of sums over nearly the same silos.
        """
        message, state = self._message(request), self._state(request)
        try:
            state = self._silo(len(state.parameters.silos)).accept(state, message)
        except AggregationRefused as refusal:
            raise RefusedError(refusal.sentence()) from None
        if self._verb == "train" and self._clip(request.fields) != self._clip(state.parameters.agreed):
            raise RefusedError("the request names another clip than the silos agreed on for this sum")
        self._sums.begin(self._session(request.run), _when(state), model, state.present)
        self._save(request.run, state)

    def send(self, request: Request, update: Tensors, fields: Fields) -> tuple[Tensors, Fields]:
        """What leaves of a round.

        Args:
            update: what the guards before the mask left: one vector.
            fields: what was counted; stays here but for the weight and the loss, or whether the update was within the
                clip, which are masked.

        Raises:
            RefusedError: the protocol forbids an answer.
        """
        state = self._state(request)
        silos = len(state.parameters.silos)
        how = encoding(self._recipe, silos, state.parameters.length, self._clip(state.parameters.agreed))
        if isinstance(how, NoisedEncoding):
            words = self._noised(request, update, how, fields.get(WITHIN))
        else:
            weight = weight_under(self._recipe, self._spec, fields)
            loss = 0.0 if withheld(self._recipe) else float(fields["loss"])
            key = (request.silo, request.round)
            words, _ = hidden(update[REST], loss, weight, how, key, self._recipe.seed)
        return self._hide(request, state, words)

    def send_figures(self, request: Request, measured: Fields) -> tuple[Tensors, Fields]:
        """What leaves of a measurement: its counts under the mask, and nothing else.

        Raises:
            RefusedError: the protocol forbids an answer.
            UpdateRefused: a figure cannot be added up.
        """
        return self._hide(request, self._state(request), hidden_figures(measured, self._recipe))

    def _hide(self, request: Request, state: secagg.State, words: Words) -> tuple[Tensors, Fields]:
        try:
            state, answer = self._silo(len(state.parameters.silos)).train(state, self._message(request), words)
        except AggregationRefused as refusal:
            raise RefusedError(refusal.sentence()) from None
        self._save(request.run, state)
        return sent(answer)

    def _silo(self, silos: int) -> secagg.Silo:
        """The protocol's silo, on the terms of a round of so many."""
        spec, identity = self._spec, self._identity
        risk = risk_of(spec)
        noised = noised_by_silos(self._recipe) and self._verb == "train"
        least = max(self._minimum, least_survivors(self._recipe, silos)) if noised else self._minimum
        return secagg.Silo(self._name, identity.signer, identity.directory, secagg.Policy(risk, least))

    def _noised(self, request: Request, update: Tensors, how: NoisedEncoding, within: bool | None = None) -> Words:
        """The update with this silo's noise, which is paid for; and, where the clip moves, whether it was within."""
        run = "" if self._simulated else request.run  # its name is another in every simulation of one recipe
        secret = secret_of(self._folder, (self._recipe.seed, self._name) if self._simulated else None)
        beside = json.dumps([how.fields, within], sort_keys=True)  # noise is for one grid and one scale
        released = tensors_digest(update, beside)
        stream = SecretStream(secret, "silo noise", run, request.round, self._name, released)
        words = hidden_noised(update[REST], how, stream, within)
        spec, folder = self._recipe.privacy, self._file(request.run).parent
        assert spec is not None
        budget = Budget("silo", "zero-out", spec.epsilon, spec.delta, {self._name: 1})
        digest = hashlib.sha256(words.tobytes()).hexdigest()
        with disk_errors(folder, "silo's ledger"), Ledger(folder / LEDGER, budget) as ledger:
            ledger.charge(Event(request.run, request.round, 0, self._name, how.mechanism, digest))
        return words

    def _agrees(self, message: secagg.Message) -> None:
        """Raises RefusedError: what would be added up is not what this run's recipe says."""
        silos, length = message.fields.get("silos"), message.fields.get("length")
        if not isinstance(silos, list) or type(length) is not int or length <= BESIDE:
            raise RefusedError("secure aggregation of nobody, or of nothing")
        wanted: Fields = {"malicious": self._spec.coordinator == "malicious"}
        if self._verb == "evaluate":
            wanted |= {"ring_bits": figures_ring(len(silos)), "length": figures_length(self._recipe)}
            wanted["agreed"] = figures_agreed(self._recipe)
        else:
            agreed = message.fields.get("agreed")
            how = encoding(self._recipe, len(silos), length, self._clip(agreed if isinstance(agreed, dict) else {}))
            wanted |= {"ring_bits": how.ring_bits, "agreed": how.fields}
        for name, value in wanted.items():
            if message.fields.get(name) != value:
                raise RefusedError(f"secure aggregation with another '{name}' than this run's recipe has")

    def _clip(self, fields: Fields) -> float | None:
        """Where the round's clip is, by a request or by what silos agree on; None where it does not move.

        Raises:
            RefusedError: it does, and they name none that is above 0 and finite.
        """
        spec = self._recipe.privacy
        return None if spec is None or spec.adaptive is None else bound_of(spec, fields)

    def _message(self, request: Request) -> secagg.Message:
        try:
            return from_fields(request.fields[MASKS])
        except (KeyError, TypeError, ValueError, AttributeError):
            raise RefusedError(
                "what leaves in this run leaves under masks, and the request says not with whom"
            ) from None

    def _state(self, request: Request) -> secagg.State:
        state = self._load(request.run)
        if state is None:
            raise RefusedError("this silo has given no keys in this run")
        return state

    def _load(self, run: str) -> secagg.State | None:
        file = self._file(run)
        if not file.exists():
            return None
        with disk_errors(file, "silo's state"):
            return from_bytes(file.read_bytes())

    def _save(self, run: str, state: secagg.State) -> None:
        file = self._file(run)
        with disk_errors(file, "silo's state"):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.parent.mkdir(mode=0o700, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            temporary.unlink(missing_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as handle:
                handle.write(to_bytes(state))
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(file)
            sync_folder(file.parent)

    def _file(self, run: str) -> Path:
        return self._folder / run / ("masks.json" if self._verb == "train" else f"masks-{self._verb}.json")

    def _session(self, run: str) -> str:
        return run if self._verb == "train" else f"{run}/{self._verb}"


def _when(state: secagg.State) -> tuple[int, int]:
    return state.parameters.round, state.parameters.attempt


def received(request: Request) -> secagg.Message:
    """A request of the protocol's own verbs as the protocol has it."""
    fields = {name: value for name, value in request.fields.items() if name != OF}
    return secagg.Message({name: tensor.numpy() for name, tensor in request.tensors.items()}, fields)


def sent(answer: secagg.Message) -> tuple[Tensors, Fields]:
    """A message of the protocol as what travels."""
    return {name: torch.from_numpy(array) for name, array in answer.arrays.items()}, answer.fields
