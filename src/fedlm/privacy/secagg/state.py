"""What a silo remembers of an aggregation, between phases and over restarts. It holds secrets: keep it 0600."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.keys import PublicKeys
from fedlm.privacy.secagg.message import Message, canonical, from_fields, to_fields
from fedlm.privacy.secagg.parameters import Parameters, read
from fedlm.privacy.secagg.shamir import Share

FORMAT = 1

SELF, KEY = "self", "key"
"""Kinds of shares: of a survivor's self-mask seed, of a dropped silo's mask key."""


@dataclass(frozen=True)
class State:
    """A silo's side of one attempt. Each phase returns a new one, which must be on disk before the reply is sent.

    Attributes:
        encryption, mask: X25519 private keys, 32 bytes.
        seed: of the self mask, 32 bytes.
        peers: public keys by silo, once they were checked.
        sharing: everyone that others have keys of: those that may send shares.
        own: this silo's own shares of its own secrets.
        held: by neighbour, its shares of self-mask seed and mask key.
        present: everyone whose shares were sent; empty before the phase `train`.
        survivors: the list that was signed or unmasked for.
        asked: by phase, the digest of what was asked.
        answers: by phase, what was answered, where it cannot be computed again.
        masked: SHA-256 of the only vector that this attempt's masks may hide.
        revealed: by silo, which kind of share was given out in this round, in whatever attempt.
        summed: the survivors that were unmasked for in this round, in whatever attempt.
        aborted: why no share is given out any more; empty while it goes on.
    """

    silo: str
    parameters: Parameters
    encryption: bytes
    mask: bytes
    seed: bytes
    peers: Mapping[str, PublicKeys] = field(default_factory=dict)
    sharing: tuple[str, ...] = ()
    own: tuple[int, int] = (0, 0)
    held: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    present: tuple[str, ...] = ()
    survivors: tuple[str, ...] = ()
    asked: Mapping[str, bytes] = field(default_factory=dict)
    answers: Mapping[str, Message] = field(default_factory=dict)
    masked: bytes = b""
    revealed: Mapping[str, str] = field(default_factory=dict)
    summed: tuple[str, ...] = ()
    aborted: str = ""

    def answered(self, phase: str, asked: bytes, answer: Message | None = None, **changes: Any) -> State:
        """With what a phase has changed."""
        answers = {**self.answers, phase: answer} if answer is not None else self.answers
        return replace(self, asked={**self.asked, phase: asked}, answers=answers, **changes)

    def erased(self, why: str) -> State:
        """Without any secret: nothing that was shared in this attempt can be given out again."""
        return replace(self, encryption=b"", mask=b"", seed=b"", own=(0, 0), held={}, answers={}, aborted=why)


def to_bytes(state: State) -> bytes:
    """JSON."""
    return canonical(
        {
            "format": FORMAT,
            "silo": state.silo,
            "parameters": state.parameters.fields,
            "secrets": [secret.hex() for secret in (state.encryption, state.mask, state.seed)],
            "peers": {silo: [key.hex() for key in keys] for silo, keys in state.peers.items()},
            "sharing": list(state.sharing),
            "own": [hex(share) for share in state.own],
            "held": {silo: [hex(share) for share in shares] for silo, shares in state.held.items()},
            "present": list(state.present),
            "survivors": list(state.survivors),
            "asked": {phase: asked.hex() for phase, asked in state.asked.items()},
            "answers": {phase: to_fields(answer) for phase, answer in state.answers.items()},
            "masked": state.masked.hex(),
            "revealed": dict(state.revealed),
            "summed": list(state.summed),
            "aborted": state.aborted,
        }
    )


def from_bytes(data: bytes) -> State:
    """Raises AggregationRefused: these are not a state that `to_bytes` gave."""
    try:
        kept = json.loads(data)
        if kept["format"] != FORMAT:
            raise ValueError
        encryption, mask, seed = map(bytes.fromhex, kept["secrets"])
        return State(
            silo=kept["silo"],
            parameters=read(kept["parameters"]),
            encryption=encryption,
            mask=mask,
            seed=seed,
            peers={silo: PublicKeys(*map(bytes.fromhex, keys)) for silo, keys in kept["peers"].items()},
            sharing=tuple(kept["sharing"]),
            own=_pair(kept["own"]),
            held={silo: _pair(shares) for silo, shares in kept["held"].items()},
            present=tuple(kept["present"]),
            survivors=tuple(kept["survivors"]),
            asked={phase: bytes.fromhex(asked) for phase, asked in kept["asked"].items()},
            answers={phase: from_fields(answer) for phase, answer in kept["answers"].items()},
            masked=bytes.fromhex(kept["masked"]),
            revealed=kept["revealed"],
            summed=tuple(kept["summed"]),
            aborted=kept["aborted"],
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AggregationRefused(
            "the kept state of secure aggregation cannot be read",
            fix="start a new run: neither without it nor from an older copy can this silo tell what it has given out",
        ) from None


def _pair(shares: list[str]) -> Share:
    first, second = shares
    return int(first, 16), int(second, 16)
