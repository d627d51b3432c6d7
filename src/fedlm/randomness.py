"""Keyed randomness: every draw comes from a generator named by what it is for.

A generator depends on (run seed, purpose, round, silo ...) alone, so the order of work, the engine and the number of
workers never change a result.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, *parts: str | int) -> int:
    """A 63-bit integer derived by SHA-256 from the run's seed and the parts, e.g. key(0, "sample", round)."""
    text = "\x1f".join([str(seed), *(f"{type(p).__name__}:{p}" for p in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *parts: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator for this purpose alone."""
    return torch.Generator(device=device).manual_seed(key(seed, *parts))


def numpy_generator(seed: int, *parts: str | int) -> np.random.Generator:
    """A numpy generator for this purpose alone."""
    return np.random.Generator(np.random.Philox(key(seed, *parts)))
