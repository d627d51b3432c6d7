"""The way down, for `federation.downlink.send: changed`: what silos hold already does not travel again.

A silo keeps the last message of each verb ('train', 'evaluate') that it received, whole (`federation.silo.received`).
The coordinator remembers which messages each silo has answered, and by tensor how long its content has been what it is
(hashes, never a copy). A message then has

    - tensors that the silo does not hold, under their own names;
    - a *plan*: one byte for each name of the whole message, in sorted order, that says where the silo finds the tensor:
      in this message, in what it holds of either verb, or there with a difference added;
    - the difference, where guards are on the way down: one payload of their chain for all tensors that moved;
    - the list of names, where it is not that of a message which the silo holds;
    - and in its fields the digest of the whole message.

So evaluating and then training the same model sends it once, and constants travel once.

With guards the server's step leads from the model theta^ that all silos hold towards theta; C(theta - theta^ + e) is
sent, all move to theta^ + C(...), and e, what was lost, is added the next time (error feedback at the server: Tang et
al., ICML 2019). The coordinator itself goes on from theta^, so what silos load is what is measured, checkpointed and
exported. e and the payload lie in the checkpoint, since a resumed run sends the same payload again.

When something goes wrong:
    - A silo that does not hold what the plan says (it lost its files, or comes back from a checkpoint that the
      coordinator went back behind), or that gets another digest, answers `Failure(UNSYNCED)` and stores nothing. It is
      asked again in the same exchange, with everything, and counts as having nothing else. Both messages' bytes count.
    - A silo that did not answer, or that is new, gets by its last answered message, or everything. One that misses a
      step of the guards gets the moved tensors whole: there is one payload, that of the last step.
    - A repeated request has the same whole content and so the same digest, which is what a silo's idempotency is about:
      it answers from its stored reply however the content travelled.
    - Killed anywhere, a resumed run knows what the checkpoint knew. A silo that has received more since then finds the
      digest of a message it holds, and needs nothing of this one.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fedlm.federation.engines.wire import serialized_size
from fedlm.guards import Key, get_chain
from fedlm.messages import Engine, Failure, FailureKind, Fields, Reply, Request, Tensors
from fedlm.recipe.schema import Recipe

VERBS = ("train", "evaluate")

SENT = 0
"""In a plan: the tensor is in the message."""
HELD = {"train": 1, "evaluate": 2}
"""As it was in the last message of this verb."""
MOVED = {"train": 3, "evaluate": 4}
"""As it was there, with the difference added."""

RESERVED = "downlink/"
PLAN, NAMES, STEP, ERROR = f"{RESERVED}plan", f"{RESERVED}names", f"{RESERVED}step/", f"{RESERVED}error/"

WHOLE, LISTED, STEPPED = "whole", "listed", "stepped"
"""Fields: the whole message's digest; the verb whose list of names holds; the round of the difference."""


def content_hash(tensor: Tensor) -> str:
    """128 bits of SHA-256 over type, shape and bytes."""
    here = tensor.detach().cpu().contiguous()
    state = hashlib.sha256(f"{here.dtype}{tuple(here.shape)}".encode())
    state.update(here.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:32]


def digest(hashes: dict[str, str]) -> str:
    """Of a whole message, from its tensors' hashes by name."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


@dataclass
class _Content:
    """A tensor in the messages of one verb."""

    hash: str
    since: int
    """Number of the first message in which it has this content."""
    before: str = ""
    """The content that it had until then."""
    before_since: int = 0


@dataclass
class _Stream:
    """The messages of one verb to silos of one rank."""

    tensors: dict[str, _Content] = field(default_factory=dict)
    number: int = 0
    """Of the last one."""
    listed: int = 0
    """Of the first one with these names."""


@dataclass
class _Seen:
    """What a silo has answered."""

    rank: int
    train: int = 0
    evaluate: int = 0


@dataclass
class _Step:
    """What moved last: by name, the contents before and after."""

    round: int
    before: dict[str, str]
    after: dict[str, str]


class Downlink:
    """The coordinator's side, for one run.

    Args:
        rank_of: by silo, the LoRA rank it works with; silos of a rank get the same messages.
    """

    def __init__(self, recipe: Recipe, rank_of: Callable[[str], int]) -> None:
        self._seed, self._rank_of = recipe.seed, rank_of
        self._chain = get_chain(recipe.federation.downlink.guards, feedback=True)
        self._streams: dict[str, dict[str, _Stream]] = {}
        self._seen: dict[str, _Seen] = {}
        self._number = 0
        self._step: _Step | None = None
        self._payload: Tensors = {}
        self._errors: Tensors = {}
        self._hashed: dict[int, tuple[Tensors, dict[str, str]]] = {}
        """Of the messages of the exchange under way."""

    # ---------------------------------------------------------------- messages

    def exchange(
        self, engine: Engine, requests: Iterable[Request], deadline: float | None
    ) -> Generator[Reply | Failure]:
        """The engine's exchange of these requests, one for a silo at most, in fewer bytes."""
        until = None if deadline is None else time.monotonic() + deadline
        asked: dict[str, tuple[Request, Request, int]] = {}
        alike: dict[tuple[int, bytes, str | None], Tensors] = {}
        """One object for all silos that get the same, which engines send once."""

        def messages() -> Iterator[Request]:
            for request in requests:
                message, number = self._message(request, alike)
                asked[request.silo] = request, message, number
                yield message

        behind: list[str] = []
        try:
            with closing(_each(engine.exchange(messages(), deadline))) as answers:
                for answer in answers:
                    if isinstance(answer, Failure) and answer.kind is FailureKind.UNSYNCED:
                        behind.append(answer.silo)
                        self._seen.pop(answer.silo, None)
                        continue
                    request, _, number = asked[answer.silo]
                    self._note(answer, request, number)
                    yield answer
            if not behind:
                return
            left = None if until is None else max(0.0, until - time.monotonic())
            again = (_whole(asked[silo][0], self._hashes(asked[silo][0].tensors)) for silo in behind)
            with closing(_each(engine.exchange(again, left))) as answers:
                for answer in answers:
                    request, message, number = asked[answer.silo]
                    self._note(answer, request, number)
                    if isinstance(answer, Reply):
                        received = answer.fields["received_bytes"] + serialized_size(message.tensors)
                        answer = replace(answer, fields={**answer.fields, "received_bytes": received})
                    yield answer
        finally:
            self._hashed.clear()

    def _message(self, request: Request, alike: dict[tuple[int, bytes, str | None], Tensors]) -> tuple[Request, int]:
        """What travels of a request, and its number."""
        if not request.tensors:
            return request, 0
        rank = self._rank_of(request.silo)
        streams = self._streams.setdefault(str(rank), {verb: _Stream() for verb in VERBS})
        hashes = self._hashes(request.tensors)
        stream = self._advance(streams[request.verb], hashes)
        seen = self._seen.get(request.silo, _Seen(rank))
        if seen.rank != rank:
            seen = _Seen(rank)
        plan = self._planned(hashes, streams, seen)
        if not any(plan):
            return _whole(request, hashes), stream.number
        names = sorted(hashes)
        listed = next((verb for verb in VERBS if _lists(streams[verb], names, getattr(seen, verb))), None)
        key = (id(request.tensors), plan, listed)
        if key not in alike:
            message = {PLAN: torch.frombuffer(bytearray(plan), dtype=torch.uint8)}
            if listed is None:
                message[NAMES] = torch.frombuffer(bytearray(json.dumps(names).encode()), dtype=torch.uint8)
            message |= {name: request.tensors[name] for name, code in zip(names, plan, strict=True) if code == SENT}
            if any(code in MOVED.values() for code in plan):
                message |= {STEP + part: value for part, value in self._payload.items()}
            alike[key] = message
        fields: Fields = {**request.fields, WHOLE: digest(hashes), LISTED: listed}
        if self._step is not None:
            fields[STEPPED] = self._step.round
        return replace(request, tensors=alike[key], fields=fields), stream.number

    def _planned(self, hashes: dict[str, str], streams: dict[str, _Stream], seen: _Seen) -> bytes:
        """Where a silo finds each tensor."""
        plan: dict[str, int] = {}
        moved: list[str] = []
        for name in sorted(hashes):
            places = [(verb, streams[verb].tensors.get(name), getattr(seen, verb)) for verb in VERBS]
            plan[name] = SENT
            for verb, content, last in places:
                if content is not None and content.hash == hashes[name] and last >= content.since:
                    plan[name] = HELD[verb]
                    break
            else:
                if self._step is None or self._step.after.get(name) != hashes[name]:
                    continue
                for verb, content, last in places:
                    if content is not None and _had(content, self._step.before[name], last):
                        plan[name] = MOVED[verb]
                        moved.append(name)
                        break
        if self._step is not None and len(moved) < len(self._step.after):  # the payload is of all of them or of none
            plan |= dict.fromkeys(moved, SENT)
        return bytes(plan.values())

    def _advance(self, stream: _Stream, hashes: dict[str, str]) -> _Stream:
        """Enter a message's contents."""
        if {name: content.hash for name, content in stream.tensors.items()} == hashes:
            return stream
        self._number += 1
        if stream.tensors.keys() != hashes.keys():
            stream.listed = self._number
        tensors: dict[str, _Content] = {}
        for name, found in hashes.items():
            old = stream.tensors.get(name)
            if old is None:
                tensors[name] = _Content(found, self._number)
            else:
                tensors[name] = old if old.hash == found else _Content(found, self._number, old.hash, old.since)
        stream.tensors, stream.number = tensors, self._number
        return stream

    def _hashes(self, tensors: Tensors) -> dict[str, str]:
        if id(tensors) not in self._hashed:
            self._hashed[id(tensors)] = tensors, {name: content_hash(tensor) for name, tensor in tensors.items()}
        return self._hashed[id(tensors)][1]

    def _note(self, answer: Reply | Failure, request: Request, number: int) -> None:
        if isinstance(answer, Failure) or not number:
            return
        rank = self._rank_of(answer.silo)
        seen = self._seen.get(answer.silo)
        if seen is None or seen.rank != rank:
            seen = self._seen[answer.silo] = _Seen(rank)
        setattr(seen, request.verb, number)

    # ---------------------------------------------------------------- guards

    def check(self, shapes: dict[str, torch.Size]) -> None:
        """Whether the guards fit a step of these tensors. Raises UpdateRefused."""
        if self._chain is not None and shapes:
            self._chain.layouts({name: shapes[name] for name in sorted(shapes)})

    def rounded(self, before: Tensors, after: Tensors, round_: int) -> Tensors:
        """The model that silos move to, when the server's step leads from `before` to `after`: `after` itself without
        guards.

        Raises:
            UpdateRefused: the guards do not fit the model.
        """
        if self._chain is None:
            return after
        names = sorted(name for name, value in after.items() if name in before and _moves(before[name], value))
        if not names:
            self._step, self._payload = None, {}
            return after
        zero = torch.zeros(())
        steps = {n: after[n].float() - before[n].float() + self._errors.get(n, zero) for n in names}
        key = downlink_key(self._seed, round_)
        self._payload = self._chain.encode(steps, key)
        decoded = self._chain.decode(self._payload, {n: step.shape for n, step in steps.items()}, key)
        following = {**after, **moved(before, decoded)}
        for n in names:
            self._errors[n] = after[n].float() - following[n] + self._errors.get(n, zero)
        self._step = _Step(
            round_, {n: content_hash(before[n]) for n in names}, {n: content_hash(following[n]) for n in names}
        )
        return following

    # ---------------------------------------------------------------- across processes

    def dump(self) -> tuple[Fields, Tensors]:
        """What a checkpoint keeps: plain JSON, and tensors whose names begin with `RESERVED`."""
        kept = {
            "number": self._number,
            "seen": {silo: asdict(seen) for silo, seen in self._seen.items()},
            "streams": {rank: {v: asdict(s) for v, s in streams.items()} for rank, streams in self._streams.items()},
            "step": self._step and asdict(self._step),
        }
        tensors = {ERROR + name: error for name, error in self._errors.items()}
        return kept, tensors | {STEP + name: part for name, part in self._payload.items()}

    def load(self, kept: Fields, tensors: Tensors) -> None:
        """Go on from what a checkpoint kept."""
        if not kept:
            return
        self._number = kept["number"]
        self._seen = {silo: _Seen(**seen) for silo, seen in kept["seen"].items()}
        self._streams = {
            rank: {verb: _loaded(stream) for verb, stream in streams.items()}
            for rank, streams in kept["streams"].items()
        }
        self._step = _Step(**kept["step"]) if kept["step"] else None
        self._errors = {n.removeprefix(ERROR): t for n, t in tensors.items() if n.startswith(ERROR)}
        self._payload = {n.removeprefix(STEP): t for n, t in tensors.items() if n.startswith(STEP)}


def without_reserved(state: Tensors) -> Tensors:
    """A checkpoint's server tensors without those of the downlink."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(RESERVED)}


def moved(before: Tensors, steps: Tensors) -> Tensors:
    """The tensors that move, after their steps: the same bits at the coordinator and in every silo."""
    return {name: before[name].float() + step for name, step in steps.items()}


def downlink_key(seed: int, round_: int) -> Key:
    """The key of the step that a round's end takes."""
    return (seed, "downlink", round_)


def _loaded(kept: dict[str, Any]) -> _Stream:
    tensors = {name: _Content(**content) for name, content in kept["tensors"].items()}
    return _Stream(tensors, kept["number"], kept["listed"])


def _whole(request: Request, hashes: dict[str, str]) -> Request:
    """The request with everything in it."""
    return replace(request, fields={**request.fields, WHOLE: digest(hashes)})


def _lists(stream: _Stream, names: list[str], last: int) -> bool:
    """Whether the silo holds this list of names."""
    return last >= stream.listed > 0 and sorted(stream.tensors) == names


def _had(content: _Content, wanted: str, last: int) -> bool:
    """Whether the silo's last message of the verb had this content."""
    if content.hash == wanted:
        return last >= content.since
    return content.before == wanted and content.before_since <= last < content.since


def _moves(before: Tensor, after: Tensor) -> bool:
    """Whether a tensor is another one, of the same shape, that can be rounded."""
    alike = before.shape == after.shape and before.is_floating_point() and after.is_floating_point()
    return alike and before is not after and not torch.equal(before, after)


def _each(answers: Iterator[Reply | Failure]) -> Generator[Reply | Failure]:
    """The same as a generator, which can be closed: that stops the silos that are no longer waited for."""
    yield from answers
