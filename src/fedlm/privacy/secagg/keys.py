"""A round's keys: made anew, signed, agreed on in pairs, and the shares that they seal.

Each silo makes two X25519 pairs for one attempt (Bonawitz et al., CCS 2017, section 4, round 0): one to seal shares to
its neighbours, whose private half never leaves it, and one for masks, whose private half its neighbours hold shares of.
What two silos agree on goes through HKDF-SHA256, bound to purpose, aggregation, parameters and both names in sorted
order.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg.identity import LONGEST, Directory
from fedlm.privacy.secagg.parameters import Parameters
from fedlm.privacy.secagg.shamir import PRIME, WIDTH

NONCE, TAG = 12, 16

SEALED = NONCE + 2 * WIDTH + TAG
"""Bytes of one neighbour's two shares, sealed."""

_PROBE = X25519PrivateKey.generate()
"""A key of this process that public keys are tried against."""


class PublicKeys(NamedTuple):
    """What a silo advertises, 32 bytes each."""

    encryption: bytes
    mask: bytes


def new_private() -> bytes:
    """A fresh X25519 private key, 32 bytes."""
    return X25519PrivateKey.generate().private_bytes_raw()


def loaded(private: bytes) -> X25519PrivateKey:
    """The key to agree with others by; making it takes as long as agreeing does."""
    return X25519PrivateKey.from_private_bytes(private)


def public(private: bytes) -> bytes:
    return loaded(private).public_key().public_bytes_raw()


def statement(parameters: Parameters, silo: str, keys: PublicKeys) -> bytes:
    """What a silo signs: its keys, for this aggregation with these parameters alone."""
    return parameters.context("keys", silo, keys.encryption, keys.mask)


def list_statement(parameters: Parameters, survivors: tuple[str, ...]) -> bytes:
    """What survivors sign with a malicious coordinator: the list of survivors."""
    return parameters.context("survivors", *survivors)


def check_keys(parameters: Parameters, silo: str, keys: PublicKeys, signature: bytes, directory: Directory) -> None:
    """Raises AggregationRefused: not this silo's keys, or keys that agree on the same secret with everybody."""
    if not 0 < len(signature) <= LONGEST:
        raise AggregationRefused(f"the signature has {len(signature)} bytes", where=silo)
    directory.verify(silo, statement(parameters, silo, keys), signature)
    for key in keys:
        try:
            agree(_PROBE, key)
        except AggregationRefused as error:
            raise AggregationRefused(error.what, where=silo) from None


def check_distinct(adverts: Mapping[str, PublicKeys]) -> None:
    """Raises AggregationRefused: a key is there twice, among all silos and purposes."""
    seen: dict[bytes, str] = {}
    for silo, keys in adverts.items():
        for key in keys:
            if key in seen:
                raise AggregationRefused(f"this silo advertises a key that '{seen[key]}' has too", where=silo)
            seen[key] = silo


def agree(private: X25519PrivateKey, other: bytes) -> bytes:
    """The secret that two X25519 keys agree on.

    Raises:
        AggregationRefused: it is all zero: the public key is of small order (RFC 7748, section 6.1).
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:
        raise AggregationRefused("a public key gives the same secret with every key") from None


def mask_key(parameters: Parameters, private: X25519PrivateKey, other: bytes, silo: str, peer: str) -> bytes:
    """The key of the mask that two neighbours share: one adds it, the other takes it away."""
    return _derive(agree(private, other), parameters.context("pairwise mask", *sorted((silo, peer))))


def self_mask_key(parameters: Parameters, seed: bytes, silo: str) -> bytes:
    """The key of a silo's own mask."""
    return _derive(seed, parameters.context("self mask", silo))


def commitment(parameters: Parameters, seed: bytes, silo: str) -> bytes:
    """SHA-256 that tells whether a seed given back from shares is the silo's; it hides 32 random bytes."""
    return hashlib.sha256(parameters.context("self mask's commitment", silo, seed)).digest()


def seal(
    parameters: Parameters, private: X25519PrivateKey, other: bytes, sender: str, receiver: str, shares: tuple[int, int]
) -> bytes:
    """Shares of a silo's self-mask seed and mask key, for one neighbour. Bound to who sends them to whom and when."""
    plain = b"".join(share.to_bytes(WIDTH, "big") for share in shares)
    nonce, bound = secrets.token_bytes(NONCE), _direction(parameters, sender, receiver)
    key = _sealing_key(parameters, private, other, sender, receiver)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, plain, bound)


def unseal(
    parameters: Parameters, private: X25519PrivateKey, other: bytes, sender: str, receiver: str, sealed: bytes
) -> tuple[int, int]:
    """The shares again.

    Raises:
        AggregationRefused: altered, sealed for another aggregation or by or for someone else, or not field elements.
    """
    key, bound = _sealing_key(parameters, private, other, sender, receiver), _direction(parameters, sender, receiver)
    try:
        plain = ChaCha20Poly1305(key).decrypt(sealed[:NONCE], sealed[NONCE:], bound)
    except (InvalidTag, ValueError):
        raise AggregationRefused(
            "its shares cannot be opened: altered, or of another round", where=sender, fix="leave this silo out"
        ) from None
    shares = int.from_bytes(plain[:WIDTH], "big"), int.from_bytes(plain[WIDTH:], "big")
    if len(plain) != 2 * WIDTH or max(shares) >= PRIME:
        raise AggregationRefused("its shares are not field elements", where=sender, fix="leave this silo out")
    return shares


def _sealing_key(parameters: Parameters, private: X25519PrivateKey, other: bytes, sender: str, receiver: str) -> bytes:
    info = parameters.context("shares", *sorted((sender, receiver)), "from", sender)
    return _derive(agree(private, other), info)


def _direction(parameters: Parameters, sender: str, receiver: str) -> bytes:
    return parameters.context("shares", "from", sender, "to", receiver)


def _derive(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)
