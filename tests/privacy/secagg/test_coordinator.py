"""What the coordinator refuses from silos, and whom it finds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedlm.errors import AggregationRefused, RunError
from fedlm.privacy.secagg import Message, keys
from fedlm.privacy.secagg.identity import Ed25519Signer
from fedlm.privacy.secagg.message import from_bytes
from fedlm.privacy.secagg.shamir import WIDTH
from tests.privacy.secagg.parties import Alter, Federation, identity, names, parameters, total, with_array, with_fields

LIAR = "silo-02"


def altering(phase: str, change: Any) -> Alter:
    """Changes what the liar answers in one phase."""
    return lambda now, silo, reply: change(reply) if (now, silo) == (phase, LIAR) else reply


def bumped(name: str, rows: int = 1) -> Any:
    """The last byte of an array's first rows is another one."""

    def change(reply: Message) -> Message:
        array = reply.arrays[name].copy()
        array.reshape(len(array), -1)[:rows, -1] ^= 1
        return with_array(reply, name, array)

    return change


@pytest.mark.parametrize(
    ("phase", "change", "says"),
    [
        ("keys", bumped("mask"), "signature is not"),
        ("keys", bumped("signature"), "signature is not"),
        ("keys", lambda r: with_fields(r, round=9), "another round"),
        ("keys", lambda r: Message({}, r.fields), "arrays are not"),
        ("keys", lambda r: with_array(r, "mask", np.zeros(31, np.uint8)), "not uint8"),
        ("shares", lambda r: with_fields(r, receivers=r.fields["receivers"][:-1]), "not for all"),
        ("shares", lambda r: with_array(r, "sealed", r.arrays["sealed"][:-1]), "not uint8"),
        ("train", lambda r: with_array(r, "masked", r.arrays["masked"][:-1]), "not uint8"),
        ("train", lambda r: with_array(r, "masked", r.arrays["masked"] | np.uint8(240)), "beyond its last"),
        ("train", lambda r: with_array(r, "masked", r.arrays["masked"].astype(np.float32)), "not uint8"),
        ("consistency", bumped("signature"), "signature is not"),
        ("consistency", lambda r: with_array(r, "signature", np.zeros(0, np.uint8)), "0 bytes"),
        ("unmask", lambda r: with_fields(r, survived=r.fields["survived"][:-1]), "not of those"),
        ("unmask", lambda r: with_array(r, "self", np.full((6, WIDTH), 255, np.uint8)), "not an element"),
    ],
)
def test_a_silo_whose_answer_is_refused_counts_as_one_that_dropped_out(phase: str, change: Any, says: str) -> None:
    of = parameters(6, threshold=5, malicious=True, length=37, ring_bits=20)
    federation = Federation(of, alter=altering(phase, change))
    summed = federation.run()
    with pytest.raises(AggregationRefused, match=f"{LIAR}: .*{says}"):
        raise federation.refused[LIAR]
    survivors = of.silos if phase in ("consistency", "unmask") else tuple(s for s in of.silos if s != LIAR)
    assert summed.survivors == survivors
    assert np.array_equal(summed.values, total(federation.inputs, survivors))


def test_a_key_that_another_silo_has() -> None:
    of = parameters(5)

    def copied(reply: Message) -> Message:
        mine = keys.PublicKeys(
            reply.arrays["encryption"].tobytes(), federation.replies["keys"]["silo-00"].arrays["mask"].tobytes()
        )
        signature = from_bytes(Ed25519Signer(identity(LIAR)).sign(keys.statement(of, LIAR, mine)))
        return with_array(with_array(reply, "mask", from_bytes(mine.mask)), "signature", signature)

    federation = Federation(of, alter=altering("keys", copied))
    federation.phases("keys")
    assert "'silo-00' has too" in str(federation.refused[LIAR])


def test_answers_that_were_not_asked_for() -> None:
    federation = Federation(parameters(5), gone={"shares": ["silo-04"]}).phases("train")
    reply = federation.replies["train"][LIAR]
    for silo, says in ((LIAR, "twice"), ("silo-04", "was not asked"), ("stranger", "was not asked")):
        with pytest.raises(AggregationRefused, match=says):
            federation.coordinator.take_masked(silo, reply)
    with pytest.raises(AggregationRefused, match="too late or too early"):
        federation.coordinator.take_shares(LIAR, federation.replies["shares"][LIAR])


@pytest.mark.parametrize("kind", ["self", "key"])
def test_who_gives_a_wrong_share_is_found(kind: str) -> None:
    """Against the advertised key, or the seed's commitment; the sum is right all the same."""
    of = parameters(8, threshold=4)
    federation = Federation(of, gone={"train": ["silo-06"]}, alter=altering("unmask", bumped(kind)))
    summed = federation.run()
    assert set(summed.liars) == {LIAR}
    assert ("'silo-06'" if kind == "key" else "'silo-00'") in summed.liars[LIAR]
    assert np.array_equal(summed.values, total(federation.inputs, summed.survivors))


def test_wrong_shares_that_nobody_can_be_named_for() -> None:
    """With no share to spare the sum is not to be had, and nothing wrong is given out as one."""
    of = parameters(5, threshold=4)
    gone = {"train": ["silo-04"]}
    with pytest.raises(RunError, match="shares of 'silo-04' do not give the secret"):
        Federation(of, gone=gone, alter=altering("unmask", bumped("key"))).run()
    with pytest.raises(RunError, match="shares of 'silo-00' do not give the secret"):
        Federation(of, gone=gone, alter=altering("unmask", bumped("self"))).run()


def test_a_dealer_of_wrong_shares_is_named() -> None:
    """A silo commits to another seed than it shares."""
    federation = Federation(parameters(5, threshold=3), alter=altering("shares", bumped("commitment")))
    with pytest.raises(RunError, match=f"'{LIAR}' do not give the secret that it advertised: it dealt wrong ones"):
        federation.run()


def test_the_coordinator_never_holds_both_secrets_of_a_silo() -> None:
    of = parameters(8, threshold=4)
    federation = Federation(of, gone={"train": ["silo-06", "silo-07"], "unmask": ["silo-00"]}).phases()
    kinds: dict[str, set[str]] = {}
    for owner, kind in federation.coordinator._shares:
        kinds.setdefault(owner, set()).add(kind)
    assert kinds == {s: {"key"} if s in ("silo-06", "silo-07") else {"self"} for s in names(8)}
    reply = federation.replies["unmask"][LIAR]
    swapped = with_fields(
        Message({"self": reply.arrays["key"], "key": reply.arrays["self"]}, reply.fields),
        survived=reply.fields["dropped"],
        dropped=reply.fields["survived"],
    )
    federation.coordinator._unmasked.discard(LIAR)
    with pytest.raises(AggregationRefused, match="not of those"):
        federation.coordinator.take_unmask(LIAR, swapped)


def test_a_survivor_that_too_few_can_unmask() -> None:
    """On a sparse graph enough may be left in all, and too few around one silo."""
    of = parameters(12, 4, 4)
    near = of.among("silo-00", of.silos)
    with pytest.raises(RunError, match=r"3 of the holders of the shares of 'silo-\d+' answered, and it takes 4"):
        Federation(of, gone={"train": near[:2]}).run()
    with pytest.raises(RunError, match=r"phase 'unmask'.*of the shares of"):
        Federation(of, gone={"unmask": near[:2]}).run()


def test_requests_bind_their_aggregation() -> None:
    of = parameters(5)
    federation = Federation(of).phases("shares")
    assert all(r.fields.items() >= of.session.items() for r in federation.requests["shares"].values())
    assert replace(of, agreed={"x": 1}).digest != of.digest
