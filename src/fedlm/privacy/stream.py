"""Random words that only the holder of a secret can know: AES-256 in counter mode (NIST SP 800-38A) under a key that
HKDF-SHA256 (RFC 5869) derives from the secret and the purpose.

NumPy's own generators are no help where noise protects data: who sees enough of Philox' or PCG64's output knows the
rest. A `numpy.random.BitGenerator` over these words would be called back in Python for every number; samplers here take
words in bulk instead.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from fedlm.errors import PrivacyError

SECRET_BYTES = 32


def fresh_secret() -> bytes:
    """32 bytes from the operating system."""
    return os.urandom(SECRET_BYTES)


class SecretStream:
    """An endless stream of words for one purpose.

    The same secret and purpose give the same words. Noise drawn twice under one purpose for *different* data cancels
    out when both releases are subtracted: name the run, round, attempt and silo, or take a fresh secret each time.

    Args:
        secret: 32 bytes that whoever sees the release does not know.
        purpose: what the words are for.

    Raises:
        PrivacyError: the secret has another length, or there is no purpose.
    """

    def __init__(self, secret: bytes, *purpose: str | int) -> None:
        if len(secret) != SECRET_BYTES:
            raise PrivacyError(
                f"the secret has {len(secret)} bytes; it must have {SECRET_BYTES}", fix="use fresh_secret()"
            )
        if not purpose:
            raise PrivacyError("random words need a purpose", fix="name the run, round, attempt and silo")
        parts = [f"{type(part).__name__}:{part}".encode() for part in purpose]
        info = b"fedlm privacy noise 1" + b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(secret)
        self._cipher = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.uint64]:
        """[count] independent uniform words of 64 bits."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def bits(self, count: int) -> NDArray[np.uint8]:
        """[count] independent fair bits."""
        raw = np.frombuffer(self._cipher.update(bytes((count + 7) // 8)), dtype=np.uint8)
        return np.unpackbits(raw, count=count)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """[count] uniform in [0, 1), multiples of 2^-53."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53
