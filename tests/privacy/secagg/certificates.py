"""Certificates like those of a federation's kits, made for tests."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

Key = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
NOW = datetime.datetime(2026, 6, 1, tzinfo=datetime.UTC)


def certificate(
    names: Sequence[str],
    key: Key,
    issuer: tuple[x509.Certificate, Key] | None = None,
    *,
    ca: bool = False,
    year: int = 2026,
) -> x509.Certificate:
    """With these common names, valid in one year; its own root without an issuer."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(year, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(year, 12, 31, tzinfo=datetime.UTC))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    return built.sign(issuer[1] if issuer else key, hashes.SHA256())


def pem(of: x509.Certificate) -> bytes:
    return of.public_bytes(Encoding.PEM)
