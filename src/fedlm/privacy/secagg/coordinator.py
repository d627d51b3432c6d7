"""The coordinator's side of secure aggregation: it collects each phase, adds masked vectors as they come, and unmasks.

For each phase it gives the requests, takes the replies one by one in any order, and goes on with those that came. A
reply that is refused (AggregationRefused, naming the silo) counts as none. What it holds grows with the number of silos
only by keys and shares; of vectors there is one, the sum.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from fedlm.errors import AggregationRefused, RunError
from fedlm.privacy.secagg import keys as keyring
from fedlm.privacy.secagg.graph import core
from fedlm.privacy.secagg.identity import LONGEST, Directory
from fedlm.privacy.secagg.keys import PublicKeys
from fedlm.privacy.secagg.masks import add_mask, reduce, subtract_mask
from fedlm.privacy.secagg.message import Bytes, Message, Words, octets
from fedlm.privacy.secagg.packing import add_packed
from fedlm.privacy.secagg.parameters import Parameters, check_session
from fedlm.privacy.secagg.shamir import PRIME, WIDTH, Share, recover_checked
from fedlm.privacy.secagg.signatures import join_signatures
from fedlm.privacy.secagg.state import KEY, SELF


class Phase(IntEnum):
    KEYS = 0
    SHARES = 1
    TRAIN = 2
    CONSISTENCY = 3
    UNMASK = 4
    DONE = 5


@dataclass(frozen=True)
class Sum:
    """What an aggregation tells.

    Attributes:
        values: the survivors' vectors added up modulo 2^ring_bits, uint32 [length].
        survivors: whose vectors are in it, sorted.
        liars: by silo that gave wrong shares, what it did; the sum is right all the same.
    """

    values: Words
    survivors: tuple[str, ...]
    liars: dict[str, str] = field(default_factory=dict)


class Coordinator:
    """One attempt.

    Args:
        parameters: what all silos are asked to agree on.
        directory: to check the silos' signatures with.
    """

    def __init__(self, parameters: Parameters, directory: Directory) -> None:
        self._parameters, self._directory = parameters, directory
        self._phase, self._asked = Phase.KEYS, frozenset(parameters.silos)
        self._keys: dict[str, PublicKeys] = {}
        self._key_signatures: dict[str, bytes] = {}
        self._seals: dict[str, dict[str, bytes]] = {}
        self._commitments: dict[str, bytes] = {}
        self._sharing: frozenset[str] = frozenset()
        """Those whose shares were passed on: masks are between them."""
        self._total = np.zeros(parameters.length, np.uint32)
        self._masked: set[str] = set()
        self._list_signatures: dict[str, bytes] = {}
        self._shares: dict[tuple[str, str], list[Share]] = {}
        """By silo and kind of secret; of each silo only one kind is ever asked for."""
        self._unmasked: set[str] = set()

    @property
    def survivors(self) -> tuple[str, ...]:
        """Those whose masked vectors arrived."""
        return tuple(sorted(self._masked))

    def keys_requests(self) -> dict[str, Message]:
        """The first request, for everyone invited."""
        return {silo: Message({}, self._parameters.fields) for silo in self._parameters.silos}

    def take_keys(self, silo: str, reply: Message) -> None:
        """Raises AggregationRefused: not this silo's signed keys, or a key that another one has."""
        self._expect(silo, Phase.KEYS, self._keys)
        with_signature = ("encryption", "mask", "signature")
        self._check(silo, reply, with_signature)
        found = PublicKeys(*(_octets(silo, reply, name, 32).tobytes() for name in with_signature[:2]))
        signature = _octets(silo, reply, "signature", -1).tobytes()
        keyring.check_keys(self._parameters, silo, found, signature, self._directory)
        keyring.check_distinct({**self._keys, silo: found})
        self._keys[silo], self._key_signatures[silo] = found, signature

    def shares_requests(self) -> dict[str, Message]:
        """The second: each silo gets the keys it needs.

        Raises:
            RunError: too few silos advertised keys.
        """
        present = self._proceed(Phase.KEYS, Phase.SHARES, self._keys)
        requests = {}
        for silo in present:
            others = self._among(silo, present)
            signatures, sizes = join_signatures([self._key_signatures[other] for other in others])
            arrays = {
                name: _rows([getattr(self._keys[other], name) for other in others], 32)
                for name in ("encryption", "mask")
            }
            fields = {"present": sorted(present), "silos": list(others), "sizes": sizes}
            requests[silo] = self._request({**arrays, "signatures": signatures}, **fields)
        return requests

    def take_shares(self, silo: str, reply: Message) -> None:
        """Raises AggregationRefused: not one sealed pair of shares for each neighbour."""
        self._expect(silo, Phase.SHARES, self._seals)
        self._check(silo, reply, ("sealed", "commitment"), "receivers")
        receivers = self._among(silo, self._asked)
        if reply.fields["receivers"] != list(receivers):
            raise AggregationRefused("its shares are not for all of its neighbours", where=silo)
        sealed = _octets(silo, reply, "sealed", len(receivers), keyring.SEALED)
        self._commitments[silo] = _octets(silo, reply, "commitment", 32).tobytes()
        self._seals[silo] = {other: row.tobytes() for other, row in zip(receivers, sealed, strict=True)}

    def train_requests(self) -> dict[str, Message]:
        """The third: each silo gets the shares that its neighbours sealed for it.

        Raises:
            RunError: too few silos shared their secrets.
        """
        self._sharing = present = self._proceed(Phase.SHARES, Phase.TRAIN, self._seals)
        requests = {}
        for silo in present:
            senders = self._among(silo, present)
            sealed = _rows([self._seals[sender].pop(silo) for sender in senders], keyring.SEALED)
            requests[silo] = self._request({"sealed": sealed}, present=sorted(present), senders=list(senders))
        self._seals = {}
        return requests

    def take_masked(self, silo: str, reply: Message) -> None:
        """Add a masked vector to the sum, which then cannot do without this silo's shares.

        Raises:
            AggregationRefused: it is not uint8 [payload_bytes].
        """
        self._expect(silo, Phase.TRAIN, self._masked)
        self._check(silo, reply, ("masked",))
        masked = _octets(silo, reply, "masked", self._parameters.payload_bytes)
        try:
            add_packed(self._total, masked, self._parameters.ring_bits)
        except AggregationRefused as error:
            raise AggregationRefused(error.what, where=silo) from None
        self._masked.add(silo)

    def consistency_requests(self) -> dict[str, Message]:
        """The fourth, with a malicious coordinator: everyone whose vector arrived signs the list of them.

        Raises:
            RunError: too few masked vectors arrived.
        """
        if not self._parameters.malicious:
            raise RunError("this aggregation has no phase 'consistency'")
        self._survivors_stand(Phase.CONSISTENCY)
        return {silo: self._request({}, survivors=list(self.survivors)) for silo in self.survivors}

    def take_consistency(self, silo: str, reply: Message) -> None:
        """Raises AggregationRefused: not this silo's signature under the list."""
        self._expect(silo, Phase.CONSISTENCY, self._list_signatures)
        self._check(silo, reply, ("signature",))
        signature = _octets(silo, reply, "signature", -1).tobytes()
        if not 0 < len(signature) <= LONGEST:
            raise AggregationRefused(f"the signature has {len(signature)} bytes", where=silo)
        self._directory.verify(silo, keyring.list_statement(self._parameters, self.survivors), signature)
        self._list_signatures[silo] = signature

    def unmask_requests(self) -> dict[str, Message]:
        """The last: for every survivor a share of its self-mask seed is asked for, for every silo that shared and did
        not survive one of its mask key.

        Raises:
            RunError: too few masked vectors arrived, or too few survivors signed the list.
        """
        fields = {"survivors": list(self.survivors)}
        if not self._parameters.malicious:
            self._survivors_stand(Phase.UNMASK)
            return {silo: self._request({}, **fields) for silo in self.survivors}
        self._at(Phase.CONSISTENCY)
        signers = sorted(self._list_signatures)
        if len(signers) < self._parameters.quorum:
            raise self._below(Phase.CONSISTENCY, len(signers), self._parameters.quorum)
        self._phase, self._asked = Phase.UNMASK, frozenset(signers)
        signatures, sizes = join_signatures([self._list_signatures[signer] for signer in signers])
        return {
            silo: self._request({"signatures": signatures}, **fields, signers=signers, sizes=sizes) for silo in signers
        }

    def take_unmask(self, silo: str, reply: Message) -> None:
        """Raises AggregationRefused: not one share, of the right kind, for each of its neighbours and itself."""
        self._expect(silo, Phase.UNMASK, self._unmasked)
        self._check(silo, reply, (SELF, KEY), "survived", "dropped")
        owners = sorted({silo, *self._among(silo, self._sharing)})
        lists = {
            "survived": [owner for owner in owners if owner in self._masked],
            "dropped": [owner for owner in owners if owner not in self._masked],
        }
        if any(reply.fields[name] != wanted for name, wanted in lists.items()):
            raise AggregationRefused("its shares are not of those that they were asked for", where=silo)
        place, found = self._parameters.places[silo], []
        for kind, of in ((SELF, lists["survived"]), (KEY, lists["dropped"])):
            for owner, row in zip(of, _octets(silo, reply, kind, len(of), WIDTH), strict=True):
                value = int.from_bytes(row.tobytes(), "big")
                if value >= PRIME:
                    raise AggregationRefused("a share is not an element of the field", where=silo)
                found.append(((owner, kind), (place, value)))
        for secret, share in found:
            self._shares.setdefault(secret, []).append(share)
        self._unmasked.add(silo)

    def finish(self) -> Sum:
        """Take off what masks are left: every survivor's own, and those that it shared with silos that dropped out.

        Raises:
            RunError: fewer shares than the threshold, or shares that give no secret that fits.
        """
        self._at(Phase.UNMASK)
        parameters, liars = self._parameters, dict[str, str]()
        dropped = [silo for silo in sorted(self._sharing - self._masked) if self._among(silo, self._masked)]
        secrets = {
            **{silo: self._recover(silo, SELF, liars) for silo in self.survivors},
            **{silo: self._recover(silo, KEY, liars) for silo in dropped},
        }
        for silo in self.survivors:
            subtract_mask(self._total, keyring.self_mask_key(parameters, secrets[silo], silo))
        for silo in dropped:
            private = keyring.loaded(secrets[silo])
            for survivor in self._among(silo, self._masked):
                key = keyring.mask_key(parameters, private, self._keys[survivor].mask, silo, survivor)
                (subtract_mask if survivor < silo else add_mask)(self._total, key)
        reduce(self._total, parameters.ring_bits)
        self._phase, self._shares = Phase.DONE, {}
        return Sum(self._total, self.survivors, liars)

    def _recover(self, silo: str, kind: str, liars: dict[str, str]) -> bytes:
        """A silo's secret, 32 bytes, checked against what it advertised; who gave a wrong share of it is noted."""
        parameters, shares = self._parameters, self._shares.get((silo, kind), [])
        threshold = parameters.design.threshold
        if len(shares) < threshold:
            raise self._below(Phase.UNMASK, len(shares), threshold, f" of the shares of '{silo}'")

        def right(value: int) -> bool:
            if value >= 2**256:
                return False
            secret = value.to_bytes(32, "big")
            if kind == KEY:
                return keyring.public(secret) == self._keys[silo].mask
            return keyring.commitment(parameters, secret, silo) == self._commitments[silo]

        found = recover_checked(shares, threshold, right)
        if found is None:
            givers = ", ".join(parameters.silos[x - 1] for x, _ in shares)
            raise RunError(
                f"the shares of '{silo}' do not give the secret that it advertised: it dealt wrong ones, or too many "
                f"of {givers} gave wrong ones to tell which",
                where="secure aggregation, phase 'unmask'",
                fix="begin another attempt, without them if it recurs",
            )
        for place in found[1]:
            liars[parameters.silos[place - 1]] = f"its share of '{silo}' is wrong, or '{silo}' dealt it a wrong one"
        return found[0].to_bytes(32, "big")

    def _survivors_stand(self, following: Phase) -> None:
        """Every secret that must be given back has enough holders left."""
        self._at(Phase.TRAIN)
        parameters, left = self._parameters, frozenset(self._masked)
        threshold = parameters.design.threshold
        if len(left) < threshold:
            raise self._below(Phase.TRAIN, len(left), threshold)
        for silo in sorted(self._sharing):
            holders = len(parameters.holders(silo) & left)
            if holders < threshold and (silo in left or self._among(silo, left)):
                raise self._below(Phase.TRAIN, holders, threshold, f" of the holders of the shares of '{silo}'")
        self._phase, self._asked = following, left

    def _proceed(self, now: Phase, following: Phase, answered: Collection[str]) -> frozenset[str]:
        """Close a phase with those who answered and whose secrets enough of the others hold."""
        self._at(now)
        threshold = self._parameters.design.threshold
        left = core(self._parameters.graph, answered, threshold)
        if len(left) < threshold:
            raise self._below(now, len(answered), threshold)
        self._phase, self._asked = following, left
        return left

    def _among(self, silo: str, present: Collection[str]) -> tuple[str, ...]:
        return self._parameters.among(silo, present)

    def _request(self, arrays: dict[str, Bytes], **fields: object) -> Message:
        return Message(dict(arrays), {**self._parameters.session, **fields})

    def _at(self, phase: Phase) -> None:
        if self._phase is not phase:
            raise RunError(
                f"secure aggregation is in phase '{self._phase.name.lower()}', and this is of '{phase.name.lower()}'",
                fix="go through the phases in order",
            )

    def _expect(self, silo: str, phase: Phase, answered: Collection[str]) -> None:
        if self._phase is not phase:
            raise AggregationRefused(f"its answer to '{phase.name.lower()}' came too late or too early", where=silo)
        if silo not in self._asked:
            raise AggregationRefused("this silo was not asked", where=silo)
        if silo in answered:
            raise AggregationRefused(f"it answered '{phase.name.lower()}' twice", where=silo)

    def _check(self, silo: str, reply: Message, arrays: tuple[str, ...], *fields: str) -> None:
        try:
            check_session(reply, self._parameters, arrays, *fields)
        except AggregationRefused as error:
            raise AggregationRefused(error.what, where=silo) from None

    def _below(self, phase: Phase, have: int, need: int, of: str = "") -> RunError:
        return RunError(
            f"secure aggregation of round {self._parameters.round} cannot go on after '{phase.name.lower()}': "
            f"{have}{of} answered, and it takes {need}",
            where=f"secure aggregation, phase '{phase.name.lower()}'",
            fix="begin another attempt with the silos that answer, or expect more of them to drop out",
        )


def _octets(silo: str, reply: Message, name: str, *shape: int) -> Bytes:
    try:
        return octets(reply, name, *shape)
    except AggregationRefused as error:
        raise AggregationRefused(error.what, where=silo) from None


def _rows(rows: list[bytes], width: int) -> Bytes:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), width).copy()
