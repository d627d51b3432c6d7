"""Who silos are in a simulation, and how they prove it: keys that follow from the run's seed.

Everyone in a simulation is one party, so these protect nothing; what is tested with them is the protocol. Over a
network silos have the certificates of their kits.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlm.privacy.secagg.identity import Directory, Ed25519Directory, Ed25519Signer, Signer


@dataclass(frozen=True)
class Identity:
    """A silo's own, and what it knows of the others'."""

    signer: Signer
    directory: Directory


def simulated_signer(seed: int, silo: str) -> Signer:
    return Ed25519Signer(_key(seed, silo))


class SimulatedDirectory:
    """Everyone's public key, made when it is asked for."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def verify(self, silo: str, statement: bytes, signature: bytes) -> None:
        public = _key(self._seed, silo).public_key().public_bytes_raw()
        Ed25519Directory({silo: public}).verify(silo, statement, signature)


def simulated(seed: int, silo: str) -> Identity:
    """A silo's identity in a simulation of this seed."""
    return Identity(simulated_signer(seed, silo), SimulatedDirectory(seed))


def _key(seed: int, silo: str) -> Ed25519PrivateKey:
    derived = HKDF(SHA256(), 32, salt=None, info=b"fedlm: identity of a simulated silo: " + silo.encode())
    return Ed25519PrivateKey.from_private_bytes(derived.derive(str(seed).encode()))
