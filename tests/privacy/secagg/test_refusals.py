"""What a silo refuses, and that it gives nothing out when it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import Design, Message, Parameters, Policy, Risk, keys
from fedlm.privacy.secagg.identity import Ed25519Signer
from fedlm.privacy.secagg.message import from_bytes
from fedlm.privacy.secagg.signatures import join_signatures
from fedlm.privacy.secagg.state import from_bytes as state_from_bytes
from fedlm.privacy.secagg.state import to_bytes
from tests.privacy.secagg.parties import (
    TRUSTING,
    Federation,
    directory,
    identity,
    names,
    next_attempt,
    parameters,
    with_array,
    with_fields,
)

ME = "silo-01"


def refused(federation: Federation, phase: str, request: Message, says: str, silo: str = ME) -> None:
    """The silo refuses, and its state stays as it was."""
    before = federation.states.get(silo)
    with pytest.raises(AggregationRefused, match=says):
        federation.answer(phase, silo, request)
    assert federation.states.get(silo) == before


def asked(of: Parameters, last: str, **options: Any) -> tuple[Federation, Message]:
    """A federation in which this silo has yet to answer a phase, and the honest request of it."""
    federation = Federation(of, gone={last: [ME]}, **options).phases(last)
    return federation, federation.requests[last][ME]


def listed(request: Message, *gone: str, field: str = "survivors") -> Message:
    return with_fields(request, **{field: [s for s in request.fields[field] if s not in gone]})


def resigned(of: Parameters, silo: str, public: keys.PublicKeys) -> bytes:
    return Ed25519Signer(identity(silo)).sign(keys.statement(of, silo, public))


def with_keys(of: Parameters, request: Message, silo: str, public: keys.PublicKeys) -> Message:
    """Other keys of a silo in a request, rightly signed by it."""
    place = request.fields["silos"].index(silo)
    arrays = {name: request.arrays[name].copy() for name in request.arrays}
    arrays["encryption"][place], arrays["mask"][place] = (from_bytes(key) for key in public)
    arrays["signatures"][64 * place : 64 * (place + 1)] = from_bytes(resigned(of, silo, public))
    return Message(arrays, request.fields)


# keys


@pytest.mark.parametrize(
    ("of", "policy", "says"),
    [
        (parameters(3), Policy(TRUSTING, minimum=4), "fewer than the 4"),
        (parameters(10, threshold=2), Policy(Risk(0.0, 0.2)), "threshold of 2 is not safe"),
        (parameters(10, threshold=6), Policy(replace(TRUSTING, malicious=True)), "lists of survivors are signed"),
        (parameters(10, threshold=6, malicious=True), Policy(TRUSTING), "threshold of 6 is not safe"),
        (parameters(100, 4, 3), Policy(Risk(0.1, 0.1)), "connected"),
        (parameters(3, silos=("a", "b", "c")), Policy(TRUSTING), "does not take part"),
    ],
)
def test_terms_that_a_silo_does_not_accept(of: Parameters, policy: Policy, says: str) -> None:
    federation = Federation(parameters(3), policy=policy)
    refused(federation, "keys", Message({}, of.fields), says)


@pytest.mark.parametrize(
    "wrong",
    [
        {"protocol": "fedlm secure aggregation 0"},
        {"silos": [*names(5), "silo-04"]},
        {"silos": list(names(5)[::-1])},
        {"silos": ["silo-01"]},
        {"silos": "silo-01"},
        {"threshold": 1},
        {"threshold": 6},
        {"degree": 3},
        {"degree": 5},
        {"ring_bits": 33},
        {"ring_bits": 1},
        {"length": 0},
        {"length": 2**40},
        {"round": -1},
        {"round": 1.0},
        {"attempt": True},
        {"seed": "00"},
        {"malicious": 1},
        {"agreed": []},
        {"agreed": {"much": "x" * 2**16}},
        {"agreed": {"not JSON": float("nan")}},
        {"run": ""},
        {"extra": 1},
    ],
    ids=str,
)
def test_malformed_parameters(wrong: dict[str, Any]) -> None:
    refused(Federation(parameters(5)), "keys", Message({}, {**parameters(5).fields, **wrong}), ".")


def test_an_attempt_has_one_set_of_parameters() -> None:
    of = parameters(5)
    federation = Federation(of).phases("keys")
    refused(federation, "keys", Message({}, replace(of, ring_bits=8).fields), "other content")
    refused(federation, "keys", Message({}, replace(of, run="x").fields), "another silo's or run's")


def test_attempts_and_rounds_only_go_forward_with_fresh_keys() -> None:
    of = parameters(5, attempt=4)
    federation = Federation(of).phases("keys")
    for earlier in (replace(of, attempt=3), replace(of, round=2, attempt=9)):
        refused(federation, "keys", Message({}, earlier.fields), "is over")
    first = federation.state(ME)
    for later in (next_attempt(of), replace(of, round=4, attempt=0)):
        after, reply = federation.silos[ME].keys(first, Message({}, later.fields))
        assert {after.encryption, after.mask, after.seed} & {first.encryption, first.mask, first.seed} == set()
        assert not np.array_equal(reply.arrays["mask"], federation.replies["keys"][ME].arrays["mask"])


# shares


def test_too_few_keys_for_the_threshold_or_the_silos_own_minimum() -> None:
    federation, request = asked(parameters(6, threshold=4), "shares", policy=Policy(TRUSTING, minimum=5))
    for present, silos in ((names(6)[:3], names(6)[:1] + names(6)[2:3]), (names(6)[:4], ["silo-00", *names(6)[2:4]])):
        keep = [request.fields["silos"].index(s) for s in silos]
        arrays = {name: request.arrays[name][keep] for name in ("encryption", "mask")}
        signatures = [request.arrays["signatures"].tobytes()[64 * k : 64 * k + 64] for k in keep]
        arrays["signatures"], sizes = join_signatures(signatures)
        fields = {**request.fields, "present": list(present), "silos": list(silos), "sizes": sizes}
        refused(federation, "shares", Message(arrays, fields), f"{len(present)} silos advertised keys")


def test_keys_that_are_forged_doubled_or_reflected() -> None:
    of = parameters(5)
    federation, request = asked(of, "shares")
    own, other = federation.state(ME).peers[ME], keys.public(keys.new_private())
    forged = request.arrays["mask"].copy()
    forged[0] = from_bytes(other)
    refused(federation, "shares", with_array(request, "mask", forged), "silo-00: the signature is not this silo's")
    taken = keys.PublicKeys(*(request.arrays[name][1].tobytes() for name in ("encryption", "mask")))  # of silo-02
    for public, says in (
        (keys.PublicKeys(other, other), "silo-00.*'silo-00' has too"),
        (keys.PublicKeys(other, taken.mask), "'silo-00' has too"),
        (keys.PublicKeys(taken.mask, other), "'silo-00' has too"),
        (keys.PublicKeys(other, own.mask), "'silo-01' has too"),
        (keys.PublicKeys(own.mask, other), "'silo-01' has too"),
        (keys.PublicKeys(other, bytes(32)), "silo-00: a public key gives the same secret"),
    ):
        refused(federation, "shares", with_keys(of, request, "silo-00", public), says)
    federation.answer("shares", ME, request)


@pytest.mark.parametrize("place", [0, 64 * 3 + 5])
def test_signatures_of_another_round(place: int) -> None:
    of = parameters(5)
    federation, request = asked(of, "shares")
    old = Federation(replace(of, round=2)).phases("keys").replies["keys"]["silo-00"]
    public = keys.PublicKeys(old.arrays["encryption"].tobytes(), old.arrays["mask"].tobytes())
    replayed = with_keys(of, request, "silo-00", public)
    replayed.arrays["signatures"][:64] = old.arrays["signature"]
    refused(federation, "shares", replayed, "not this silo's")
    broken = request.arrays["signatures"].copy()
    broken[place] ^= 1
    refused(federation, "shares", with_array(request, "signatures", broken), "not this silo's")


def test_lists_of_keys_that_do_not_fit() -> None:
    federation, request = asked(parameters(5), "shares")
    silos = request.fields["silos"]
    for fields, says in (
        ({"present": [*names(5), "stranger"]}, "do not take part"),
        ({"present": ["silo-00", *names(5)]}, "twice"),
        ({"present": list(names(5)[::-1])}, "not in order"),
        ({"present": ["silo-00", *names(5)[2:]]}, "not on the list"),
        ({"silos": silos[:3]}, "not those of all"),
        ({"silos": [*silos[:1], ME, *silos[2:]]}, "not those of all"),
        ({"silos": [silos[0], *silos[:3]]}, "twice"),
        ({"sizes": [64] * 3}, "sizes"),
        ({"sizes": [64, 64, 64, 65]}, "sizes"),
        ({"sizes": [-64, 192, 64, 64]}, "sizes"),
    ):
        refused(federation, "shares", with_fields(request, **fields), says)


def test_beside_a_malicious_coordinator_everyones_keys_are_asked_for() -> None:
    """A list could otherwise hold silos that do not exist; a sparse graph is refused by everyone."""
    with pytest.raises(AggregationRefused, match="only the complete graph"):
        parameters(20, 8, 7, malicious=True)
    of = parameters(20, threshold=14, malicious=True)
    federation, request = asked(of, "shares")
    near = request.fields["silos"][1:]
    assert len(near) == 18
    keep = [request.fields["silos"].index(s) for s in near]
    arrays = {name: request.arrays[name][keep] for name in ("encryption", "mask")}
    arrays["signatures"] = request.arrays["signatures"].reshape(-1, 64)[keep].reshape(-1)
    fields = {**request.fields, "silos": list(near), "sizes": [64] * len(near)}
    refused(federation, "shares", Message(arrays, fields), "not those of all")


def test_keys_do_not_change_between_phases() -> None:
    of = parameters(5)
    federation = Federation(of).phases("shares")
    public = keys.PublicKeys(keys.public(keys.new_private()), keys.public(keys.new_private()))
    changed = with_keys(of, federation.requests["shares"][ME], "silo-00", public)
    refused(federation, "shares", changed, "other content")


# train


def test_shares_of_others_or_of_other_rounds() -> None:
    of = parameters(5)
    federation, request = asked(of, "train")
    elsewhere = Federation(replace(of, round=2)).phases("train").requests["train"][ME]
    swapped = request.arrays["sealed"][[1, 0, 2, 3]]
    for sealed in (elsewhere.arrays["sealed"], swapped):
        refused(federation, "train", with_array(request, "sealed", sealed), "silo-00: its shares cannot be opened")
    altered = request.arrays["sealed"].copy()
    altered[2, 30] ^= 1
    refused(federation, "train", with_array(request, "sealed", altered), "silo-03: its shares cannot be opened")


def test_lists_of_shares_that_do_not_fit() -> None:
    of = parameters(6, threshold=4)
    federation = Federation(of, gone={"keys": ["silo-05"], "train": [ME]}).phases("train")
    request = federation.requests["train"][ME]
    fewer = with_array(request, "sealed", request.arrays["sealed"][:2])
    for asked_, says in (
        (with_fields(request, present=list(names(6))), "do not take part"),  # silo-05 has no keys
        (with_fields(request, senders=request.fields["senders"][:3]), "not those of all neighbours"),
        (with_fields(fewer, present=["silo-00", ME, "silo-02"], senders=["silo-00", "silo-02"]), "3 silos sent shares"),
        (with_fields(request, round=4), "another round"),
        (with_fields(request, attempt=1), "another attempt"),
        (with_fields(request, run="x"), "another run"),
    ):
        refused(federation, "train", asked_, says)


def test_one_attempt_masks_one_vector() -> None:
    """Two vectors under one mask would show their difference."""
    federation = Federation(parameters(5)).phases("train")
    request = federation.requests["train"][ME]
    federation.inputs[ME] = federation.inputs[ME].copy()
    federation.inputs[ME][3] ^= 1
    refused(federation, "train", request, "another vector was masked")


@pytest.mark.parametrize("wrong", [np.zeros(36, np.uint32), np.zeros(37, np.int64), np.full(37, 2**20, np.uint32)])
def test_vectors_outside_the_ring(wrong: np.ndarray[Any, Any]) -> None:
    federation, request = asked(parameters(5), "train")
    federation.inputs[ME] = wrong
    refused(federation, "train", request, "vector")


# unmask


def test_lists_of_survivors_that_do_not_fit() -> None:
    of = parameters(6, threshold=4)
    federation = Federation(of, gone={"shares": ["silo-05"], "unmask": [ME]}).phases()
    request = federation.requests["unmask"][ME]
    for asked_, says in (
        (with_fields(request, survivors=list(names(6))), "do not take part"),  # silo-05 sent no shares
        (listed(request, "silo-00", "silo-02"), "3 silos sent masked vectors"),
        (listed(request, ME), "not on the list"),
        (with_fields(request, survivors=["silo-00", *request.fields["survivors"]]), "twice"),
        (with_fields(request, survivors={"silo-00": 1}), "not a list"),
    ):
        refused(federation, "unmask", asked_, says)
    minded = Federation(of, policy=Policy(TRUSTING, minimum=6), gone={"unmask": [ME]}).phases()
    refused(minded, "unmask", listed(minded.requests["unmask"][ME], "silo-00"), "takes 6")


def test_never_both_shares_of_one_silo() -> None:
    federation = Federation(parameters(6, threshold=4)).phases()
    refused(federation, "unmask", listed(federation.requests["unmask"][ME], "silo-00"), "other content")


@pytest.mark.parametrize("one_sum", [True, False])
def test_never_both_shares_of_one_silo_across_attempts(one_sum: bool) -> None:
    """A silo that survived in one attempt of a round cannot have dropped out in the next, nor the other way round."""
    of = parameters(6, threshold=4)
    for first, second in (((), ("silo-00",)), (("silo-00",), ())):
        policy = Policy(TRUSTING, one_sum=one_sum)
        federation = Federation(of, policy=policy, gone={"train": first}).phases()
        again = Federation(next_attempt(of), policy=policy, gone={"train": second, "unmask": [ME]})
        again.states = federation.states
        again.phases()
        refused(again, "unmask", again.requests["unmask"][ME], "the other secret of 'silo-00'")
        later = Federation(replace(of, round=4), policy=policy, gone={"train": second})
        later.states = again.states
        later.run()


def test_one_round_has_one_sum() -> None:
    """Without a silo that was in the first attempt's sum the second's would tell its update."""
    of = parameters(6, threshold=4)
    for one_sum in (True, False):
        policy = Policy(TRUSTING, one_sum=one_sum)
        federation = Federation(of, policy=policy).phases()
        again = Federation(next_attempt(of), policy=policy, gone={"keys": ["silo-00"], "unmask": [ME]})
        again.states = federation.states
        again.phases()
        if one_sum:
            refused(again, "unmask", again.requests["unmask"][ME], "a sum over other silos")
        else:
            again.answer("unmask", ME, again.requests["unmask"][ME])
    same = Federation(next_attempt(of))
    same.states = Federation(of).phases().states
    assert same.run().survivors == of.silos


def test_no_mask_no_share() -> None:
    """A silo that sent no vector in this attempt, or is asked before, gives nothing out."""
    of = parameters(5)
    federation, request = asked(of, "train")
    survivors = Message({}, {**of.session, "survivors": list(names(5))})
    refused(federation, "unmask", survivors, "comes after 'train'")
    opened = federation.silos[ME].accept(federation.state(ME), request)
    federation.states[ME] = to_bytes(opened)
    refused(federation, "unmask", survivors, "sent no masked vector")


# consistency


def test_one_list_is_signed() -> None:
    federation = Federation(parameters(6, threshold=5, malicious=True)).phases("consistency")
    refused(federation, "consistency", listed(federation.requests["consistency"][ME], "silo-00"), "other content")


def test_without_a_malicious_coordinator_no_list_is_signed() -> None:
    of = parameters(5)
    federation = Federation(of).phases("train")
    refused(federation, "consistency", Message({}, {**of.session, "survivors": list(names(5))}), "no phase")


def signed_list(of: Parameters, survivors: Sequence[str], signers: Sequence[str], said: Sequence[str]) -> Message:
    statement = keys.list_statement(of, tuple(said))
    signatures, sizes = join_signatures([Ed25519Signer(identity(s)).sign(statement) for s in signers])
    fields = {**of.session, "survivors": list(survivors), "signers": list(signers), "sizes": sizes}
    return Message({"signatures": signatures}, fields)


def test_unmasking_takes_enough_signatures_under_exactly_this_list() -> None:
    of = parameters(9, threshold=7, malicious=True)
    quorum = of.quorum
    assert quorum == 7
    federation = Federation(of, gone={"unmask": [ME]}).phases()
    everyone, fewer = of.silos, of.silos[:8]
    for request, says in (
        (signed_list(of, everyone, everyone[: quorum - 1], everyone), f"it takes {quorum}"),
        (signed_list(of, everyone, everyone[:quorum], fewer), "silo-00: the signature is not this silo's"),
        (signed_list(of, fewer, fewer, fewer), "not the list of survivors that was signed"),
        (signed_list(next_attempt(of), everyone, everyone, everyone), "another attempt"),
        (with_fields(signed_list(of, everyone, everyone, everyone), signers=["silo-00"] * 9), "twice"),
        (Message({}, {**of.session, "survivors": list(everyone)}), "arrays are not"),
    ):
        refused(federation, "unmask", request, says)
    federation.answer("unmask", ME, signed_list(of, everyone, everyone[:quorum], everyone))


def test_a_coordinator_that_tells_two_stories_gets_shares_from_one_side_only() -> None:
    """Bonawitz et al. (2017), section 6.2: half are told that silo-08 survived, half that it did not."""
    of = parameters(9, threshold=7, malicious=True)
    federation = Federation(of).phases("train")
    stories = {s: of.silos if i % 2 else of.silos[:8] for i, s in enumerate(of.silos[:8])}
    signed: dict[tuple[str, ...], list[str]] = {}
    for silo, story in stories.items():
        federation.answer("consistency", silo, Message({}, {**of.session, "survivors": list(story)}))
        signed.setdefault(story, []).append(silo)
    for silo, story in stories.items():
        refused(federation, "unmask", signed_list(of, story, signed[story], story), "it takes 7", silo)


# aborting


def test_after_an_abort_nothing_is_given_out() -> None:
    federation = Federation(parameters(5, threshold=4, malicious=True), gone={"unmask": [ME]}).phases()
    aborted = federation.silos[ME].abort(federation.state(ME), "the run was stopped")
    assert not any((aborted.encryption, aborted.mask, aborted.seed, aborted.held, aborted.answers, any(aborted.own)))
    federation.states[ME] = to_bytes(aborted)
    for phase in ("keys", "shares", "train", "consistency", "unmask"):
        refused(federation, phase, federation.requests[phase][ME], "this attempt is over: the run was stopped")


def test_a_new_attempt_ends_the_one_before() -> None:
    of = parameters(5)
    federation = Federation(of, gone={"unmask": [ME]}).phases()
    again = Federation(next_attempt(of))
    again.states = federation.states
    again.phases("keys")
    for phase in ("shares", "train", "unmask"):
        refused(federation, phase, federation.requests[phase][ME], "another attempt")
    refused(federation, "keys", federation.requests["keys"][ME], "is over")


def test_a_state_that_cannot_be_read() -> None:
    federation = Federation(parameters(5)).phases("train")
    whole = federation.states[ME]
    assert to_bytes(state_from_bytes(whole)) == whole
    for data in (b"", b"{}", whole[:-1], whole.replace(b'"format":1', b'"format":2'), b"[]", b"\xff"):
        with pytest.raises(AggregationRefused, match="kept state"):
            state_from_bytes(data)


def test_a_silo_that_is_not_enrolled_signs_nothing() -> None:
    of = parameters(5)
    federation, request = asked(of, "shares")
    silo = replace(federation.silos[ME], directory=directory(names(4)))
    with pytest.raises(AggregationRefused, match="silo-04: this silo is not enrolled"):
        silo.shares(federation.state(ME), request)


def test_a_threshold_above_two_thirds_is_asked_for_with_a_malicious_coordinator() -> None:
    for n in (3, 4, 5, 9, 30):
        federation = Federation(parameters(n, threshold=2 * n // 3 + 1, malicious=True))
        federation.phases("keys")
        low = replace(federation.parameters, attempt=1, design=Design(n - 1, max(2, 2 * n // 3)))
        if low.design.threshold < 2 * n // 3 + 1:
            refused(federation, "keys", Message({}, low.fields), "not safe", "silo-00")
