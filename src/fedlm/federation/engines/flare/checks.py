"""Certificates of a network: who someone is, whether that still holds, and proof that they own the key.

Imports neither torch nor NVFlare. NVFlare writes a participant's name, organisation and role into the subject.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID, ObjectIdentifier

from fedlm.errors import NetworkError

MAY_RUN = ("lead", "project_admin")
"""Roles whose owners may run federations."""

_CONTEXT = b"fedlm operator 1\n"  # a signature made here is of no use in any other protocol
_DAY = 86400.0


@dataclass(frozen=True)
class Identity:
    """What a certificate says."""

    name: str
    org: str
    role: str
    not_before: datetime.datetime
    not_after: datetime.datetime


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate in OpenSSL's form, e.g. 'AB:CD:...': short enough to read out over a telephone.

    Raises:
        NetworkError: not a certificate.
    """
    digest = _certificate(pem).fingerprint(hashes.SHA256()).hex().upper()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def same_fingerprint(left: str, right: str) -> bool:
    """Whether two ways of writing a SHA-256 fingerprint mean the same one; False for anything that is none."""

    def plain(text: str) -> str:
        return re.sub(r"^sha256(\s*fingerprint)?\s*[:=]|[\s:]", "", text.strip().lower())

    return plain(left) == plain(right) and re.fullmatch("[0-9a-f]{64}", plain(left)) is not None


def identity(pem: bytes) -> Identity:
    """What a certificate says of its owner.

    Raises:
        NetworkError: not a certificate.
    """
    found = _certificate(pem)

    def value(oid: ObjectIdentifier) -> str:
        values = found.subject.get_attributes_for_oid(oid)
        return str(values[0].value) if values else ""

    return Identity(
        name=value(NameOID.COMMON_NAME),
        org=value(NameOID.ORGANIZATION_NAME),
        role=value(NameOID.UNSTRUCTURED_NAME),
        not_before=found.not_valid_before_utc,
        not_after=found.not_valid_after_utc,
    )


def check_certificate(pem: bytes, root: bytes, where: str, now: datetime.datetime | None = None) -> Identity:
    """The owner of a certificate that this root signed and that is valid now.

    Args:
        pem: the certificate.
        root: the root certificate.
        where: what to call the certificate in errors.
        now: the time to judge by; the machine's clock when None.

    Raises:
        NetworkError: not a certificate, signed by someone else, expired, or not valid yet.
    """
    found, issuer = _certificate(pem, where), _certificate(root, "root certificate")
    try:
        found.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        raise NetworkError(
            "this certificate was not signed by this network's root",
            where=where,
            fix="use the kit that this network's coordinator approved",
        ) from None
    now = now or datetime.datetime.now(datetime.UTC)
    for what, each in (("certificate", found), ("network's root certificate", issuer)):
        if each.not_valid_after_utc < now:
            raise NetworkError(
                f"the {what} expired on {each.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
                where=where,
                fix="ask the coordinator for a new one: `fedlm network join`, then `fedlm network approve`"
                if each is found
                else "make a new network: `fedlm network new`",
            )
        if each.not_valid_before_utc > now:
            raise NetworkError(
                f"the {what} is not valid before {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, "
                f"and this machine's clock says {now:%Y-%m-%d %H:%M} UTC",
                where=where,
                fix="set the clock (NTP)",
            )
    return identity(pem)


def days_left(pem: bytes) -> float:
    """Days until the certificate expires; negative afterwards."""
    return (_certificate(pem).not_valid_after_utc - datetime.datetime.now(datetime.UTC)).total_seconds() / _DAY


def key_matches(key: Path, pem: bytes) -> bool:
    """Whether the private key belongs to the certificate.

    Raises:
        NetworkError: the key cannot be read.
    """
    return _key(key).public_key() == _certificate(pem).public_key()


def may_run(cert_pem: bytes, root_pem: bytes) -> str:
    """The name of an operator who may run federations.

    Raises:
        NetworkError: not signed by this root, expired, or of a role that may not.
    """
    owner = check_certificate(cert_pem, root_pem, "operator's certificate")
    if owner.role not in MAY_RUN:
        raise NetworkError(
            f"{owner.name or 'this certificate'} may not run federations: its role is '{owner.role or 'none'}'",
            where="operator's certificate",
            fix=f"use the certificate of an operator with the role {MAY_RUN[0]}",
        )
    return owner.name


def sign(key_path: Path, nonce: bytes) -> bytes:
    """Prove that one owns a key, by signing what the other side has just drawn at random.

    Raises:
        NetworkError: the key cannot be read.
    """
    return _key(key_path).sign(_CONTEXT + nonce, _PADDING, hashes.SHA256())


def verify(cert_pem: bytes, nonce: bytes, signature: bytes) -> None:
    """Check that the certificate's owner signed this nonce with `sign`. Says nothing of who signed the certificate.

    Raises:
        NetworkError: not a certificate, or someone else's signature.
    """
    public = _certificate(cert_pem).public_key()
    try:
        if not isinstance(public, rsa.RSAPublicKey):
            raise InvalidSignature
        public.verify(signature, _CONTEXT + nonce, _PADDING, hashes.SHA256())
    except InvalidSignature:
        raise NetworkError(
            "the signature is not by the certificate's owner",
            where="operator's certificate",
            fix="use the key that belongs to the certificate",
        ) from None


_PADDING = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


def _certificate(pem: bytes, where: str = "certificate") -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise NetworkError("this is not a PEM certificate", where=where, fix="make the kit again") from None


def _key(path: Path) -> rsa.RSAPrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise NetworkError(f"the private key cannot be read: {error.strerror}", where=str(path)) from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise NetworkError("this is not an unencrypted PEM private key", where=str(path)) from None
    if not isinstance(key, rsa.RSAPrivateKey):
        raise NetworkError("this is not an RSA key", where=str(path), fix="make the kit again")
    return key
