"""Who a silo is: signatures by keys that were enrolled before any aggregation."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from fedlm.errors import AggregationRefused

LONGEST = 2**14
"""Bytes of a signature, with the certificate beside it."""

SMALLEST_RSA = 2048

_PSS = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


class Signer(Protocol):
    """A silo's own identity."""

    def sign(self, statement: bytes) -> bytes: ...


class Directory(Protocol):
    """What a party knows of all silos' identities."""

    def verify(self, silo: str, statement: bytes, signature: bytes) -> None:
        """Raises AggregationRefused: this silo did not sign this statement."""
        ...


class Ed25519Signer:
    """An identity of one Ed25519 key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)


class Ed25519Directory:
    """Public keys by silo, 32 bytes each."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = {silo: Ed25519PublicKey.from_public_bytes(key) for silo, key in keys.items()}

    def verify(self, silo: str, statement: bytes, signature: bytes) -> None:
        if silo not in self._keys:
            raise AggregationRefused("this silo is not enrolled", where=silo)
        try:
            self._keys[silo].verify(signature, statement)
        except InvalidSignature:
            raise _forged(silo) from None


class CertificateSigner:
    """The certificate and key that a silo has for mutual TLS; the certificate travels before each signature.

    Args:
        certificate: PEM.
        key: RSA (signs with PSS) or elliptic-curve (ECDSA), both with SHA-256.
    """

    def __init__(self, certificate: bytes, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
        self._der, self._key = x509.load_pem_x509_certificate(certificate).public_bytes(Encoding.DER), key

    def sign(self, statement: bytes) -> bytes:
        key = self._key
        signature = (
            key.sign(statement, _PSS, hashes.SHA256())
            if isinstance(key, rsa.RSAPrivateKey)
            else key.sign(statement, ec.ECDSA(hashes.SHA256()))
        )
        return len(self._der).to_bytes(2, "big") + self._der + signature


class CertificateDirectory:
    """Certificates that a pinned root issued itself, with the silo's name as common name.

    Whoever holds the root's key can make any silo's certificate. Where that is the coordinator, pin the silos' own
    certificates too.

    Args:
        root: PEM.
        pinned: by silo, SHA-256 of its certificate's DER; a silo that is not named here is then refused.
        now: the time to judge validity by.
    """

    def __init__(
        self,
        root: bytes,
        pinned: Mapping[str, bytes] | None = None,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._root, self._pinned, self._now = x509.load_pem_x509_certificate(root), pinned, now
        try:
            constraints = self._root.extensions.get_extension_for_class(x509.BasicConstraints).value
        except (x509.ExtensionNotFound, ValueError):
            raise AggregationRefused("the pinned root is not a certificate authority's certificate") from None
        if not constraints.ca:
            raise AggregationRefused("the pinned root is not a certificate authority's certificate")

    def verify(self, silo: str, statement: bytes, signature: bytes) -> None:
        size = int.from_bytes(signature[:2], "big")
        der, signature = signature[2 : 2 + size], signature[2 + size :]
        try:
            certificate = x509.load_der_x509_certificate(der)
            self._check(silo, certificate)
            key = certificate.public_key()
            if isinstance(key, rsa.RSAPublicKey) and key.key_size >= SMALLEST_RSA:
                key.verify(signature, statement, _PSS, hashes.SHA256())
            elif isinstance(key, ec.EllipticCurvePublicKey):
                key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
            else:
                raise AggregationRefused(
                    f"the certificate's key is neither RSA of {SMALLEST_RSA} bits nor EC", where=silo
                )
        except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
            raise _forged(silo) from None

    def _check(self, silo: str, certificate: x509.Certificate) -> None:
        now = self._now()
        for each in (certificate, self._root):
            if not each.not_valid_before_utc <= now <= each.not_valid_after_utc:
                raise AggregationRefused("a certificate is not valid at this time", where=silo, fix="renew it")
        certificate.verify_directly_issued_by(self._root)
        named = [str(a.value) for a in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if named != [silo]:
            raise AggregationRefused("the certificate is another one's", where=silo)
        if self._pinned is not None and certificate.fingerprint(hashes.SHA256()) != self._pinned.get(silo):
            raise AggregationRefused("the certificate is not the one that was pinned", where=silo)


def _forged(silo: str) -> AggregationRefused:
    return AggregationRefused("the signature is not this silo's", where=silo, fix="find out who altered the message")
