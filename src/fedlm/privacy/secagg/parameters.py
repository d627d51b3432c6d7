"""What all parties of one aggregation must agree on, sent with its first request and signed by every silo."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedlm.errors import AggregationRefused
from fedlm.messages import Fields
from fedlm.privacy.secagg import graph
from fedlm.privacy.secagg.graph import Design, Neighbours
from fedlm.privacy.secagg.message import Message, canonical, hexadecimal, integer, joined, names, only, text
from fedlm.privacy.secagg.packing import packed_size

PROTOCOL = "fedlm secure aggregation 1"

LONGEST = 2**33
"""Ring elements in one vector."""

AGREED = 2**16
"""Bytes of `agreed` in canonical JSON."""

SESSION = ("run", "round", "attempt")
"""Fields of every message: which aggregation it belongs to."""


@dataclass(frozen=True)
class Parameters:
    """One aggregation.

    Attributes:
        round, attempt: which one of the run; a silo never goes back.
        silos: everyone invited, sorted.
        design: degree of the graph and threshold.
        seed: 32 bytes, public, that the graph is drawn from.
        ring_bits: elements are integers modulo 2^ring_bits, 2 to 32.
        length: elements of a silo's vector.
        malicious: whether survivors sign the list of survivors before they unmask (Bonawitz et al., CCS 2017, 6.2).
            Only with the complete graph: a coordinator that chooses the seed chooses who stands around whom.
        agreed: plain JSON that nobody here reads, but that is then the same for all: scale, bits and largest weight of
            the quantisation, the recipe's fingerprint.

    Raises:
        AggregationRefused: they are malformed.
    """

    run: str
    round: int
    attempt: int
    silos: tuple[str, ...]
    design: Design
    seed: bytes
    ring_bits: int
    length: int
    malicious: bool = False
    agreed: Fields = field(default_factory=dict)

    def __post_init__(self) -> None:
        _checked(self.fields)

    @cached_property
    def fields(self) -> Fields:
        """As plain JSON; `read` reads it back."""
        return {
            "protocol": PROTOCOL,
            **self.session,
            "silos": list(self.silos),
            "degree": self.design.degree,
            "threshold": self.design.threshold,
            "seed": self.seed.hex(),
            "ring_bits": self.ring_bits,
            "length": self.length,
            "malicious": self.malicious,
            "agreed": self.agreed,
        }

    @property
    def session(self) -> Fields:
        return {"run": self.run, "round": self.round, "attempt": self.attempt}

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of all of it."""
        return hashlib.sha256(joined(PROTOCOL, "parameters", canonical(self.fields))).digest()

    @cached_property
    def graph(self) -> Neighbours:
        return graph.neighbours(self.silos, self.design.degree, self.seed)

    @property
    def quorum(self) -> int:
        """Signatures under a list of survivors, with a malicious coordinator."""
        return self.design.threshold

    @cached_property
    def places(self) -> dict[str, int]:
        """By silo, the x of the shares it holds."""
        return {silo: place for place, silo in enumerate(self.silos, 1)}

    @property
    def payload_bytes(self) -> int:
        """Of one silo's masked vector."""
        return packed_size(self.length, self.ring_bits)

    def holders(self, silo: str) -> frozenset[str]:
        """Who gets shares of this silo's secrets: its neighbours and itself."""
        return self.graph[silo] | {silo}

    def among(self, silo: str, present: Iterable[str]) -> tuple[str, ...]:
        """A silo's neighbours among those present, sorted."""
        return tuple(sorted(self.graph[silo].intersection(present)))

    def context(self, purpose: str, *parts: str | bytes) -> bytes:
        """Bytes that bind what is signed, sealed or derived to one purpose of this aggregation."""
        return self._session + joined(purpose, *parts)

    @cached_property
    def _session(self) -> bytes:
        return joined(PROTOCOL, self.run, self.round, self.attempt, self.digest)


def read(fields: Fields) -> Parameters:
    """Parameters from a message's fields.

    Raises:
        AggregationRefused: they are malformed, or of another version of the protocol.
    """
    return Parameters(**_checked(fields))


def check_session(message: Message, parameters: Parameters, arrays: Iterable[str] = (), *fields: str) -> None:
    """Raises AggregationRefused: a message has other parts than these, or belongs to another aggregation."""
    only(message, tuple(arrays), (*SESSION, *fields))
    for name, value in parameters.session.items():
        given = message.fields[name]
        if type(given) is not type(value) or given != value:
            raise AggregationRefused(f"the message is of another {name} than the one under way")


def _checked(fields: Fields) -> dict[str, Any]:
    """The arguments of `Parameters`, each of its type and within bounds."""
    named = ("protocol", *SESSION, "silos", "degree", "threshold", "seed", "ring_bits", "length", "malicious", "agreed")
    message = Message({}, fields)
    only(message, (), named)
    if fields["protocol"] != PROTOCOL:
        raise AggregationRefused(
            f"this is not '{PROTOCOL}'", where="protocol", fix="have the same version of fedlm everywhere"
        )
    listed = fields["silos"] if isinstance(fields["silos"], list) else []
    silos = names(message, "silos", {text({"silos": silo}, "silos") for silo in listed})
    n = len(silos)
    if not 3 <= n <= graph.MOST:
        raise AggregationRefused(f"{n} silos take part; it must be 3 to {graph.MOST}")
    degree = integer(fields, "degree", 2, n - 1)
    if degree % 2 and degree != n - 1:
        raise AggregationRefused(f"a graph of {n} silos has an even degree or is complete, and this one has {degree}")
    threshold = integer(fields, "threshold", 2, degree + 1)
    if type(fields["malicious"]) is not bool or not isinstance(fields["agreed"], dict):
        raise AggregationRefused("'malicious' is not yes or no, or 'agreed' no fields")
    if fields["malicious"] and degree < n - 1:
        raise AggregationRefused("with a malicious coordinator only the complete graph is safe: it chooses the seed")
    if len(canonical(fields["agreed"])) > AGREED:
        raise AggregationRefused(f"'agreed' has more than {AGREED} bytes")
    return {
        "run": text(fields, "run"),
        "round": integer(fields, "round", 0, 2**53),
        "attempt": integer(fields, "attempt", 0, 2**53),
        "silos": silos,
        "design": Design(degree, threshold),
        "seed": hexadecimal(fields, "seed", 32),
        "ring_bits": integer(fields, "ring_bits", 2, 32),
        "length": integer(fields, "length", 1, LONGEST),
        "malicious": fields["malicious"],
        "agreed": fields["agreed"],
    }
