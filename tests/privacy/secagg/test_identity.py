"""Signatures count only by the enrolled key of the silo that they are said to be of."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import Coordinator, Policy, Silo
from fedlm.privacy.secagg.identity import CertificateDirectory, CertificateSigner, Directory, Ed25519Signer
from tests.privacy.secagg.certificates import NOW, Key, certificate, pem
from tests.privacy.secagg.parties import TRUSTING, directory, identity, parameters, vectors

ROOT_KEY, RSA_KEY = (rsa.generate_private_key(65537, 2048) for _ in range(2))
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ROOT = certificate(["root"], ROOT_KEY, ca=True)
KEYS = pytest.mark.parametrize("key", [RSA_KEY, EC_KEY], ids=["RSA", "EC"])


def known(**options: object) -> CertificateDirectory:
    return CertificateDirectory(pem(ROOT), now=lambda: NOW, **options)  # type: ignore[arg-type]


def signer(key: Key, *names: str, year: int = 2026) -> CertificateSigner:
    return CertificateSigner(pem(certificate(names or ("a",), key, (ROOT, ROOT_KEY), year=year)), key)


def refused(directory: Directory, silo: str, statement: bytes, signature: bytes, says: str) -> None:
    with pytest.raises(AggregationRefused, match=says):
        directory.verify(silo, statement, signature)


def test_ed25519() -> None:
    signature = Ed25519Signer(identity("a")).sign(b"x")
    of = directory(["a", "b"])
    of.verify("a", b"x", signature)
    refused(of, "a", b"y", signature, "not this silo's")
    refused(of, "b", b"x", signature, "not this silo's")
    refused(of, "c", b"x", signature, "not enrolled")
    refused(of, "a", b"x", signature[:-1], "not this silo's")
    refused(of, "a", b"x", b"", "not this silo's")


@KEYS
def test_certificates(key: Key) -> None:
    signature = signer(key).sign(b"x")
    known().verify("a", b"x", signature)
    refused(known(), "a", b"y", signature, "not this silo's")
    refused(known(), "b", b"x", signature, "another one's")
    flipped = bytearray(signature)
    flipped[-3] ^= 1
    refused(known(), "a", b"x", bytes(flipped), "not this silo's")
    for broken in (b"", b"\0", b"\xff\xff" + signature, signature[:100], signature[:-70], bytes(2000)):
        refused(known(), "a", b"x", broken, "not this silo's")


@KEYS
def test_another_root_of_the_same_name(key: Key) -> None:
    other = rsa.generate_private_key(65537, 2048)
    forged = certificate(["a"], key, (certificate(["root"], other, ca=True), other))
    refused(known(), "a", b"x", CertificateSigner(pem(forged), key).sign(b"x"), "not this silo's")


def test_a_certificate_made_by_another_silo() -> None:
    """A silo's own certificate is no authority, whoever has it."""
    mine = certificate(["b"], EC_KEY, (ROOT, ROOT_KEY))
    forged = certificate(["a"], RSA_KEY, (mine, EC_KEY))
    refused(known(), "a", b"x", CertificateSigner(pem(forged), RSA_KEY).sign(b"x"), "not this silo's")


def test_names_validity_and_key_sizes() -> None:
    refused(known(), "a", b"x", signer(RSA_KEY, "a", "b").sign(b"x"), "another one's")
    refused(known(), "a", b"x", signer(RSA_KEY, year=2025).sign(b"x"), "not valid at this time")
    refused(known(), "a", b"x", signer(RSA_KEY, year=2027).sign(b"x"), "not valid at this time")
    weak = rsa.generate_private_key(65537, 1024)
    refused(known(), "a", b"x", signer(weak).sign(b"x"), "neither RSA of 2048 bits nor EC")


def test_a_root_that_is_none() -> None:
    with pytest.raises(AggregationRefused, match="not a certificate authority"):
        CertificateDirectory(pem(certificate(["a"], EC_KEY, (ROOT, ROOT_KEY))))


def test_pinned_certificates() -> None:
    mine, again = (certificate(["a"], EC_KEY, (ROOT, ROOT_KEY)) for _ in range(2))
    pinned = known(pinned={"a": mine.fingerprint(hashes.SHA256())})
    pinned.verify("a", b"x", CertificateSigner(pem(mine), EC_KEY).sign(b"x"))
    refused(pinned, "a", b"x", CertificateSigner(pem(again), EC_KEY).sign(b"x"), "pinned")
    other = certificate(["b"], EC_KEY, (ROOT, ROOT_KEY))
    refused(pinned, "b", b"x", CertificateSigner(pem(other), EC_KEY).sign(b"x"), "pinned")


def test_an_aggregation_with_certificates() -> None:
    of, policy = parameters(3, threshold=3, malicious=True), Policy(TRUSTING)
    keys: list[Key] = [RSA_KEY, EC_KEY, rsa.generate_private_key(65537, 2048)]
    silos = {s: Silo(s, signer(k, s), known(), policy) for s, k in zip(of.silos, keys, strict=True)}
    coordinator, states, inputs = Coordinator(of, known()), {}, vectors(of)
    for silo, request in coordinator.keys_requests().items():
        states[silo], reply = silos[silo].keys(None, request)
        coordinator.take_keys(silo, reply)
    for silo, request in coordinator.shares_requests().items():
        states[silo], reply = silos[silo].shares(states[silo], request)
        coordinator.take_shares(silo, reply)
    for silo, request in coordinator.train_requests().items():
        states[silo], reply = silos[silo].train(states[silo], request, inputs[silo])
        coordinator.take_masked(silo, reply)
    for silo, request in coordinator.consistency_requests().items():
        states[silo], reply = silos[silo].consistency(states[silo], request)
        coordinator.take_consistency(silo, reply)
    for silo, request in coordinator.unmask_requests().items():
        states[silo], reply = silos[silo].unmask(states[silo], request)
        coordinator.take_unmask(silo, reply)
    assert np.array_equal(coordinator.finish().values, sum(inputs.values()))
