"""Simulated parties that hold only what messages carried: every message goes through bytes, every state too."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import Coordinator, Design, Message, Parameters, Policy, Risk, Silo, State, Sum
from fedlm.privacy.secagg.identity import Ed25519Directory, Ed25519Signer
from fedlm.privacy.secagg.message import Words
from fedlm.privacy.secagg.state import from_bytes, to_bytes

TRUSTING = Risk(dropout_rate=0.0, corruption_rate=0.0)
PHASES = ("keys", "shares", "train", "consistency", "unmask")
Alter = Callable[[str, str, Message], Message]


def identity(silo: str) -> Ed25519PrivateKey:
    """The same for the same name, so that tests need none to be kept."""
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(silo.encode()).digest())


def directory(silos: Collection[str]) -> Ed25519Directory:
    return Ed25519Directory({silo: identity(silo).public_key().public_bytes_raw() for silo in silos})


def names(n: int) -> tuple[str, ...]:
    return tuple(f"silo-{i:02}" for i in range(n))


def parameters(n: int, degree: int | None = None, threshold: int | None = None, **changes: Any) -> Parameters:
    """A complete graph with a majority as threshold, unless other ones are given."""
    k = n - 1 if degree is None else degree
    standard: dict[str, Any] = {
        "run": "run",
        "round": 3,
        "attempt": 0,
        "silos": names(n),
        "design": Design(k, (k + 1) // 2 + 1 if threshold is None else threshold),
        "seed": bytes(range(32)),
        "ring_bits": 20,
        "length": 37,
    }
    return Parameters(**{**standard, **changes})


def sent(message: Message) -> Message:
    """As it arrives after a way as safetensors and JSON."""
    arrays = safetensors.numpy.load(safetensors.numpy.save(dict(message.arrays)))
    return Message(arrays, json.loads(json.dumps(message.fields)))


def vectors(of: Parameters, seed: int = 0) -> dict[str, Words]:
    """A random vector for each silo, small enough that the sum does not wrap around."""
    random = np.random.default_rng(seed)
    top = 2**of.ring_bits // len(of.silos)
    return {silo: random.integers(0, top, of.length, dtype=np.uint32) for silo in of.silos}


def total(of: Mapping[str, Words], silos: Collection[str]) -> Words:
    return np.sum([of[silo] for silo in silos], axis=0, dtype=np.uint32)


@dataclass
class Federation:
    """All parties of one aggregation, and what each has answered.

    Attributes:
        gone: by phase, silos that answer nothing from this phase on.
        alter: changes a reply on its way to the coordinator.
        requests: of every phase, by silo.
        replies: of every phase, by silo.
        refused: by silo, what it refused or was refused.
    """

    parameters: Parameters
    policy: Policy = field(default_factory=lambda: Policy(TRUSTING, minimum=2))
    gone: Mapping[str, Sequence[str]] = field(default_factory=dict)
    alter: Alter | None = None
    inputs: dict[str, Words] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = directory(self.parameters.silos)
        self.inputs = self.inputs or vectors(self.parameters)
        self.coordinator = Coordinator(self.parameters, known)
        self.silos = {s: Silo(s, Ed25519Signer(identity(s)), known, self.policy) for s in self.parameters.silos}
        self.states: dict[str, bytes] = {}
        self.requests: dict[str, dict[str, Message]] = {}
        self.replies: dict[str, dict[str, Message]] = {}
        self.refused: dict[str, AggregationRefused] = {}

    def state(self, silo: str) -> State:
        return from_bytes(self.states[silo])

    def answer(self, phase: str, silo: str, request: Message) -> Message:
        """What a silo answers, from its kept state to its kept state."""
        state = self.state(silo) if silo in self.states else None
        if phase == "train":
            assert state is not None
            after, reply = self.silos[silo].train(state, sent(request), self.inputs[silo])
        else:
            after, reply = getattr(self.silos[silo], phase)(state, sent(request))
        self.states[silo] = to_bytes(after)
        return reply

    def phase(self, phase: str) -> None:
        """Ask everyone who is there, and take the answers."""
        absent = {s for p, gone in self.gone.items() if PHASES.index(p) <= PHASES.index(phase) for s in gone}
        self.requests[phase] = getattr(self.coordinator, f"{phase}_requests")()
        self.replies[phase] = {}
        take = getattr(self.coordinator, "take_masked" if phase == "train" else f"take_{phase}")
        for silo, request in self.requests[phase].items():
            if silo not in absent:
                try:
                    reply = self.answer(phase, silo, request)
                    self.replies[phase][silo] = reply
                    arrived = sent(reply)
                    take(silo, self.alter(phase, silo, arrived) if self.alter else arrived)
                except AggregationRefused as error:
                    self.refused[silo] = error

    def phases(self, last: str = "unmask") -> Federation:
        for phase in PHASES[: PHASES.index(last) + 1]:
            if phase != "consistency" or self.parameters.malicious:
                self.phase(phase)
        return self

    def run(self) -> Sum:
        return self.phases().coordinator.finish()


def with_array(message: Message, name: str, array: np.ndarray[Any, Any]) -> Message:
    return Message({**message.arrays, name: array}, message.fields)


def with_fields(message: Message, **fields: Any) -> Message:
    return Message(message.arrays, {**message.fields, **fields})


def next_attempt(of: Parameters, **changes: Any) -> Parameters:
    return replace(of, attempt=of.attempt + 1, **changes)
