"""A silo's side of secure aggregation (Bonawitz et al., CCS 2017, figure 4; SecAgg+ of Bell et al., CCS 2020).

Each phase takes the silo's state and a request and gives the next state and the reply. The state must be kept (on disk,
where restarts may happen) before the reply is sent. The same request again gets the same reply; another one in a phase
that was answered is refused, since two answers under one key could be taken apart.

- `keys`: parameters come in, two fresh public keys go out, signed.
- `shares`: the others' keys come in; for each neighbour, sealed shares of self-mask seed and mask key go out.
- `train`: the neighbours' sealed shares come in, the masked vector goes out.
- `consistency`, with a malicious coordinator: the list of those who sent one comes in, a signature under it goes out.
- `unmask`: the list comes in, with enough such signatures; for each survivor a share of its self-mask seed goes out,
  for each dropped silo one of its mask key.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, replace

import numpy as np

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import keys as keyring
from fedlm.privacy.secagg.identity import LONGEST, Directory, Signer
from fedlm.privacy.secagg.keys import PublicKeys
from fedlm.privacy.secagg.masks import add_mask, reduce, subtract_mask
from fedlm.privacy.secagg.message import Message, Words, digest, from_bytes, names, octets
from fedlm.privacy.secagg.packing import pack
from fedlm.privacy.secagg.parameters import Parameters, check_session, read
from fedlm.privacy.secagg.policy import Policy
from fedlm.privacy.secagg.shamir import WIDTH, share
from fedlm.privacy.secagg.signatures import split_signatures
from fedlm.privacy.secagg.state import KEY, SELF, State


@dataclass(frozen=True)
class Silo:
    """One silo: its name, its identity, what it knows of others' identities, and its policy."""

    name: str
    signer: Signer
    directory: Directory
    policy: Policy

    def keys(self, state: State | None, request: Message) -> tuple[State, Message]:
        """Begin an attempt, which ends every earlier one for good.

        Args:
            state: what is kept of this run, or None if this is its first attempt.
            request: fields as `Parameters.fields`.

        Raises:
            AggregationRefused: malformed parameters, unsafe ones, an attempt that is over or ended, or the same attempt
                with other parameters.
        """
        asked = digest(request)
        if request.arrays:
            raise AggregationRefused("this phase takes no arrays")
        parameters = read(request.fields)
        revealed: dict[str, str] = {}
        summed: tuple[str, ...] = ()
        if state is not None:
            if state.silo != self.name or state.parameters.run != parameters.run:
                raise AggregationRefused("the kept state is another silo's or run's", fix="keep one state for each run")
            now, then = _when(parameters), _when(state.parameters)
            if now == then:
                return state, self._repeated(state, "keys", asked)
            if now < then:
                raise AggregationRefused(
                    f"round {now[0]}, attempt {now[1]} is over: this silo is in round {then[0]}, attempt {then[1]}",
                    fix="begin a new attempt; if the run was set back, a new run",
                )
            if now[0] == then[0]:
                revealed, summed = dict(state.revealed), state.summed
        self.policy.check(self.name, parameters)
        encryption, mask = keyring.new_private(), keyring.new_private()
        public = PublicKeys(keyring.public(encryption), keyring.public(mask))
        signature = self.signer.sign(keyring.statement(parameters, self.name, public))
        answer = Message(
            {
                "encryption": from_bytes(public.encryption),
                "mask": from_bytes(public.mask),
                "signature": from_bytes(signature),
            },
            parameters.session,
        )
        fresh = State(
            self.name,
            parameters,
            encryption,
            mask,
            secrets.token_bytes(32),
            peers={self.name: public},
            revealed=revealed,
            summed=summed,
        )
        return fresh.answered("keys", asked, answer), answer

    def shares(self, state: State, request: Message) -> tuple[State, Message]:
        """Check the others' keys and share this silo's two secrets among its neighbours.

        Args:
            request: fields `present` (everyone with keys) and `silos` (whose keys are in it: the neighbours);
                arrays `encryption` and `mask`, uint8 [m, 32], and `signatures`.

        Returns:
            Field `receivers`; arrays `sealed`, uint8 [m, SEALED], and `commitment`, uint8 [32], to the self-mask seed.

        Raises:
            AggregationRefused: too few silos; forged, doubled, reflected or degenerate keys; other content than before.
        """
        parameters = state.parameters
        check_session(request, parameters, ("encryption", "mask", "signatures"), "present", "silos", "sizes")
        asked = digest(request)
        if "shares" in state.asked:
            return state, self._repeated(state, "shares", asked)
        self._follows(state, "keys")
        present = names(request, "present", parameters.silos)
        self.policy.check_present(self.name, parameters, present, "advertised keys")
        peers = self._peers(state, request, present)
        places = parameters.places
        holders = (self.name, *parameters.among(self.name, present))
        threshold = parameters.design.threshold
        both = [
            dict(share(int.from_bytes(secret, "big"), threshold, [places[holder] for holder in holders]))
            for secret in (state.seed, state.mask)
        ]
        of = {holder: (both[0][places[holder]], both[1][places[holder]]) for holder in holders}
        private = keyring.loaded(state.encryption)
        sealed = [
            keyring.seal(parameters, private, peers[peer].encryption, self.name, peer, of[peer]) for peer in holders[1:]
        ]
        answer = Message(
            {
                "sealed": from_bytes(b"".join(sealed)).reshape(len(sealed), keyring.SEALED),
                "commitment": from_bytes(keyring.commitment(parameters, state.seed, self.name)),
            },
            {**parameters.session, "receivers": list(holders[1:])},
        )
        return state.answered("shares", asked, answer, peers=peers, sharing=present, own=of[self.name]), answer

    def accept(self, state: State, request: Message) -> State:
        """Open the neighbours' shares: all of `train` that can be refused before the training.

        Args:
            request: fields `present` (everyone who shared) and `senders` (the neighbours among them); array `sealed`,
                uint8 [m, SEALED], in their order.

        Raises:
            AggregationRefused: too few silos, a list that is no part of those with keys, shares that do not open.
        """
        parameters = state.parameters
        check_session(request, parameters, ("sealed",), "present", "senders")
        asked = digest(request)
        if "train" in state.asked:
            self._same(state, "train", asked)
            return state
        self._follows(state, "shares")
        present = names(request, "present", state.sharing)
        self.policy.check_present(self.name, parameters, present, "sent shares")
        senders = names(request, "senders", present)
        if senders != parameters.among(self.name, present):
            raise AggregationRefused("the shares are not those of all neighbours that sent any")
        sealed = octets(request, "sealed", len(senders), keyring.SEALED)
        private = keyring.loaded(state.encryption)
        held = {
            peer: keyring.unseal(parameters, private, state.peers[peer].encryption, peer, self.name, row.tobytes())
            for peer, row in zip(senders, sealed, strict=True)
        }
        return state.answered("train", asked, present=present, held={**held, self.name: state.own})

    def train(self, state: State, request: Message, values: Words) -> tuple[State, Message]:
        """Mask this silo's vector.

        Args:
            request: as for `accept`, which need not have been called.
            values: ring elements, uint32 [length]; not changed. Asked again, the same ones must be given.

        Returns:
            Array `masked`, uint8 [payload_bytes].

        Raises:
            AggregationRefused: as `accept`; values outside the ring, or others than were masked before.
        """
        state = self.accept(state, request)
        parameters = state.parameters
        self._live(state)
        if values.dtype != np.uint32 or values.shape != (parameters.length,):
            raise AggregationRefused(
                f"the vector is {values.dtype} {list(values.shape)}, not uint32 [{parameters.length}]"
            )
        if int(values.max()) >> parameters.ring_bits:
            raise AggregationRefused(f"the vector has elements of more than {parameters.ring_bits} bits")
        kept = hashlib.sha256(np.ascontiguousarray(values).data).digest()
        if state.masked not in (b"", kept):
            raise AggregationRefused(
                "another vector was masked in this attempt, and two under one mask would show their difference",
                fix="answer with the same vector, or let the coordinator begin another attempt",
            )
        total = values.copy()
        add_mask(total, keyring.self_mask_key(parameters, state.seed, self.name))
        private = keyring.loaded(state.mask)
        for peer in state.held:
            if peer != self.name:
                key = keyring.mask_key(parameters, private, state.peers[peer].mask, self.name, peer)
                (add_mask if self.name < peer else subtract_mask)(total, key)
        reduce(total, parameters.ring_bits)
        return replace(state, masked=kept), Message({"masked": pack(total, parameters.ring_bits)}, parameters.session)

    def consistency(self, state: State, request: Message) -> tuple[State, Message]:
        """Sign the list of those whose masked vectors arrived: once, this one, and no other for ever.

        Args:
            request: field `survivors`.

        Raises:
            AggregationRefused: the list is not part of those who shared, lacks this silo, is too short, or differs from
                the one signed before.
        """
        parameters = state.parameters
        check_session(request, parameters, (), "survivors")
        asked = digest(request)
        if "consistency" in state.asked:
            return state, self._repeated(state, "consistency", asked)
        if not parameters.malicious:
            raise AggregationRefused("this aggregation has no phase 'consistency'")
        survivors = self._survivors(state, request)
        signature = self.signer.sign(keyring.list_statement(parameters, survivors))
        answer = Message({"signature": from_bytes(signature)}, parameters.session)
        return state.answered("consistency", asked, answer, survivors=survivors), answer

    def unmask(self, state: State, request: Message) -> tuple[State, Message]:
        """Give out one share for each neighbour that sent shares: its self-mask seed's if it survived, else its mask
        key's. Never both, in whatever attempt of the round.

        Args:
            request: field `survivors`; with a malicious coordinator also `signers`, `sizes` and array `signatures`.

        Returns:
            Fields `survived` and `dropped`; arrays `self` and `key`, uint8 [m, WIDTH], in their order.

        Raises:
            AggregationRefused: the list is refused as in `consistency`, too few or forged signatures, a sum over others
                was unmasked in this round, or the other share of a silo was given out.
        """
        parameters = state.parameters
        if parameters.malicious:
            check_session(request, parameters, ("signatures",), "survivors", "signers", "sizes")
        else:
            check_session(request, parameters, (), "survivors")
        asked = digest(request)
        if "unmask" in state.asked:
            self._same(state, "unmask", asked)
            self._live(state)
            survivors = state.survivors
        else:
            survivors = self._survivors(state, request)
            if parameters.malicious:
                self._follows(state, "consistency")
                if survivors != state.survivors:
                    raise AggregationRefused("this is not the list of survivors that was signed")
                self._signatures(state, request, survivors)
        kinds = {peer: SELF if peer in survivors else KEY for peer in state.held}
        for peer, kind in kinds.items():
            if state.revealed.get(peer, kind) != kind:
                raise AggregationRefused(
                    f"a share of the other secret of '{peer}' was given out in this round, and both tell its update",
                    fix="go on with the next round",
                )
        if self.policy.one_sum and state.summed not in ((), survivors):
            raise AggregationRefused(
                "a sum over other silos was unmasked in this round, and the two may tell one silo's update",
                fix="go on with the next round",
            )
        lists = {kind: sorted(peer for peer in kinds if kinds[peer] == kind) for kind in (SELF, KEY)}
        given = {SELF: [state.held[p][0] for p in lists[SELF]], KEY: [state.held[p][1] for p in lists[KEY]]}
        answer = Message(
            {
                kind: from_bytes(b"".join(found.to_bytes(WIDTH, "big") for found in shares)).reshape(-1, WIDTH)
                for kind, shares in given.items()
            },
            {**parameters.session, "survived": lists[SELF], "dropped": lists[KEY]},
        )
        revealed = {**state.revealed, **kinds}
        return state.answered("unmask", asked, survivors=survivors, revealed=revealed, summed=survivors), answer

    def abort(self, state: State, why: str = "it was aborted") -> State:
        """End an attempt: its secrets are forgotten and none of its shares is ever given out."""
        return state.erased(why)

    def _peers(self, state: State, request: Message, present: tuple[str, ...]) -> dict[str, PublicKeys]:
        parameters = state.parameters
        silos = names(request, "silos", present)
        if set(silos) != parameters.graph[self.name] & set(present):
            raise AggregationRefused("the keys are not those of all that they should be of")
        encryption, mask = (octets(request, name, len(silos), 32) for name in ("encryption", "mask"))
        signatures = split_signatures(request, len(silos), LONGEST)
        peers = {}
        for place, silo in enumerate(silos):
            peers[silo] = PublicKeys(encryption[place].tobytes(), mask[place].tobytes())
            keyring.check_keys(parameters, silo, peers[silo], signatures[place], self.directory)
        keyring.check_distinct({self.name: state.peers[self.name], **peers})
        return {**state.peers, **peers}

    def _survivors(self, state: State, request: Message) -> tuple[str, ...]:
        self._follows(state, "train")
        if not state.masked:
            raise AggregationRefused("this silo has sent no masked vector in this attempt")
        survivors = names(request, "survivors", state.present)
        self.policy.check_present(self.name, state.parameters, survivors, "sent masked vectors")
        return survivors

    def _signatures(self, state: State, request: Message, survivors: tuple[str, ...]) -> None:
        signers, wanted = names(request, "signers", survivors), state.parameters.quorum
        if len(signers) < wanted:
            raise AggregationRefused(
                f"{len(signers)} survivors signed the list, and it takes {wanted}", fix="wait until more have signed"
            )
        said = keyring.list_statement(state.parameters, survivors)
        for signer, signature in zip(signers, split_signatures(request, len(signers), LONGEST), strict=True):
            self.directory.verify(signer, said, signature)

    def _follows(self, state: State, phase: str) -> None:
        self._live(state)
        if phase not in state.asked:
            raise AggregationRefused(f"this phase comes after '{phase}', which this silo has not answered")

    def _live(self, state: State) -> None:
        if state.aborted:
            raise AggregationRefused(
                f"this attempt is over: {state.aborted}", fix="begin another attempt, which makes new keys"
            )

    def _same(self, state: State, phase: str, asked: bytes) -> None:
        if state.asked[phase] != asked:
            raise AggregationRefused(
                f"'{phase}' was answered before, to a request of other content", fix="begin another attempt"
            )

    def _repeated(self, state: State, phase: str, asked: bytes) -> Message:
        self._live(state)
        self._same(state, phase, asked)
        return state.answers[phase]


def _when(parameters: Parameters) -> tuple[int, int]:
    return parameters.round, parameters.attempt
