"""Exact match and F1 of words, as SQuAD's evaluation defines them (Rajpurkar et al., EMNLP 2016 and ACL 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_MARKS = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words apart by one space.

    >>> normalised("The  U.S. Senate!")
    'us senate'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_MARKS)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer, normalised, is one of the references, else 0."""
    return float(normalised(answer) in {normalised(reference) for reference in references})


def f1(answer: str, references: Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, with the best of the references."""
    return max(_f1(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # nothing is right where nothing is asked for, and only there
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)
