"""What is derived, sealed and signed is bound to purpose, aggregation and both parties."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import Parameters, keys
from fedlm.privacy.secagg.graph import Design
from fedlm.privacy.secagg.identity import Ed25519Signer
from fedlm.privacy.secagg.message import joined
from tests.privacy.secagg.parties import directory, identity, parameters

OF = parameters(5)
A, B = keys.new_private(), keys.new_private()
SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ec" + "ff" * 30 + "7f",
    "ed" + "ff" * 30 + "7f",
    "ee" + "ff" * 30 + "7f",
]
"""All canonical and near-canonical points of order 1, 2, 4 and 8 of Curve25519 and its twist (Bernstein, 2006)."""

OTHERS = [
    replace(OF, run="other"),
    replace(OF, round=4),
    replace(OF, attempt=1),
    replace(OF, design=Design(4, 4)),
    replace(OF, seed=bytes(32)),
    replace(OF, ring_bits=21),
    replace(OF, malicious=True),
    replace(OF, agreed={"scale": 2}),
]
other = pytest.mark.parametrize("other", OTHERS)


def test_rfc_7748_key_exchange() -> None:
    """Section 5.2's first vector: the scalar is a private key, the u-coordinate a public one."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert keys.agree(keys.loaded(scalar), point).hex() == (
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    )


def test_both_sides_derive_the_same_keys() -> None:
    a, b = keys.loaded(A), keys.loaded(B)
    assert keys.mask_key(OF, a, keys.public(B), "silo-00", "silo-01") == keys.mask_key(
        OF, b, keys.public(A), "silo-01", "silo-00"
    )


@other
def test_keys_are_of_one_aggregation(other: Parameters) -> None:
    a, b = keys.loaded(A), keys.public(B)
    assert keys.mask_key(OF, a, b, "silo-00", "silo-01") != keys.mask_key(other, a, b, "silo-00", "silo-01")
    assert keys.self_mask_key(OF, A, "silo-00") != keys.self_mask_key(other, A, "silo-00")
    assert keys.commitment(OF, A, "silo-00") != keys.commitment(other, A, "silo-00")
    public = keys.PublicKeys(keys.public(A), keys.public(B))
    signature = Ed25519Signer(identity("silo-00")).sign(keys.statement(OF, "silo-00", public))
    keys.check_keys(OF, "silo-00", public, signature, directory(["silo-00"]))
    with pytest.raises(AggregationRefused, match="not this silo's"):
        keys.check_keys(other, "silo-00", public, signature, directory(["silo-00"]))


def test_keys_are_of_one_purpose_and_pair() -> None:
    a, b = keys.loaded(A), keys.public(B)
    found = {
        keys.mask_key(OF, a, b, "silo-00", "silo-01"),
        keys.mask_key(OF, a, b, "silo-00", "silo-02"),
        keys.self_mask_key(OF, a.exchange(X25519PrivateKey.from_private_bytes(B).public_key()), "silo-00"),
        keys._sealing_key(OF, a, b, "silo-00", "silo-01"),
        keys._sealing_key(OF, a, b, "silo-01", "silo-00"),
    }
    assert len(found) == 5


def seal(of: Parameters = OF) -> bytes:
    return keys.seal(of, keys.loaded(A), keys.public(B), "silo-00", "silo-01", (7, 2**256 + 5))


def test_sealed_shares_come_back() -> None:
    assert len(seal()) == keys.SEALED
    assert keys.unseal(OF, keys.loaded(B), keys.public(A), "silo-00", "silo-01", seal()) == (7, 2**256 + 5)
    assert seal() != seal()


@other
def test_shares_of_another_aggregation_do_not_open(other: Parameters) -> None:
    with pytest.raises(AggregationRefused, match="another round"):
        keys.unseal(OF, keys.loaded(B), keys.public(A), "silo-00", "silo-01", seal(other))


@pytest.mark.parametrize(
    ("sender", "receiver"), [("silo-01", "silo-00"), ("silo-02", "silo-01"), ("silo-00", "silo-02")]
)
def test_shares_open_only_between_their_two(sender: str, receiver: str) -> None:
    with pytest.raises(AggregationRefused, match="cannot be opened"):
        keys.unseal(OF, keys.loaded(B), keys.public(A), sender, receiver, seal())


def test_shares_are_bound_by_associated_data_besides_the_key() -> None:
    """With the right key, but as from or to someone else or of another round, the cipher itself refuses."""
    sealed, key = seal(), keys._sealing_key(OF, keys.loaded(A), keys.public(B), "silo-00", "silo-01")
    cipher, bound = ChaCha20Poly1305(key), keys._direction(OF, "silo-00", "silo-01")
    assert len(cipher.decrypt(sealed[:12], sealed[12:], bound)) == 66
    others = [keys._direction(of, "silo-00", "silo-01") for of in OTHERS]
    for wrong in (None, b"", keys._direction(OF, "silo-01", "silo-00"), keys._direction(OF, "silo-00", "x"), *others):
        with pytest.raises(InvalidTag):
            cipher.decrypt(sealed[:12], sealed[12:], wrong)


def test_altered_shares_do_not_open() -> None:
    for place in range(keys.SEALED):
        altered = bytearray(seal())
        altered[place] ^= 1
        with pytest.raises(AggregationRefused, match="cannot be opened"):
            keys.unseal(OF, keys.loaded(B), keys.public(A), "silo-00", "silo-01", bytes(altered))
    for data in (b"", seal()[:11], seal()[:-1]):
        with pytest.raises(AggregationRefused, match="cannot be opened"):
            keys.unseal(OF, keys.loaded(B), keys.public(A), "silo-00", "silo-01", data)


def test_sealed_shares_outside_the_field() -> None:
    sealed = keys.seal(OF, keys.loaded(A), keys.public(B), "silo-00", "silo-01", (1, 2**257))
    with pytest.raises(AggregationRefused, match="field elements"):
        keys.unseal(OF, keys.loaded(B), keys.public(A), "silo-00", "silo-01", sealed)


@pytest.mark.parametrize("point", SMALL_ORDER)
@pytest.mark.parametrize("high", [0, 128])
@pytest.mark.parametrize("kind", [0, 1])
def test_keys_of_small_order(point: str, high: int, kind: int) -> None:
    bad = bytearray.fromhex(point)
    bad[31] |= high
    good = keys.public(A)
    public = keys.PublicKeys(bytes(bad), good) if kind == 0 else keys.PublicKeys(good, bytes(bad))
    signature = Ed25519Signer(identity("silo-00")).sign(keys.statement(OF, "silo-00", public))
    with pytest.raises(AggregationRefused, match="silo-00: a public key gives the same secret"):
        keys.check_keys(OF, "silo-00", public, signature, directory(["silo-00"]))


def test_what_is_signed_has_one_reading() -> None:
    """Whatever is moved between neighbouring parts, or changes its type, gives other bytes."""
    parts = [
        ("ab", "c"),
        ("a", "bc"),
        ("abc",),
        ("abc", ""),
        ("ab", b"c"),
        (b"abc",),
        ("1",),
        (1,),
        (b"1",),
        (12, 3),
        (1, 23),
    ]
    assert len({joined(*each) for each in parts}) == len(parts)
