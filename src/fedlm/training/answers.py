"""What a written answer says: which choice it names, which number; and how near it is to the right one.

Exact match and F1 of words are as SQuAD's evaluation defines them (Rajpurkar et al., EMNLP 2016 and ACL 2018).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

_LETTER_FIRST = re.compile(r"^\(?([A-Z])\)?(?=[.):,]|\s*$)")
# The letter is a capital, and nothing but a mark or the end follows it: "the answer is a mammal" names no letter.
_LETTER_NAMED = re.compile(r"(?i:\b(?:answer|choice|option)\b(?:\s+is)?)\s*:?\s*\(?([A-Z])\)?(?=[.):,]|\s*(?:\n|$))")

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
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


def parse_answer(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that the text names, or None when it names none or several.

    In this order: the text is a choice; its first line is one; it begins with exactly one (the longest if they nest);
    it begins with a letter such as 'B', '(B)' or 'B.'; it says 'the answer is B'; it contains exactly one choice.

    >>> parse_answer("B) the bank", ["school", "hospital"])
    1
    """
    known = [_plain(choice) for choice in choices]
    whole, first = _plain(text), _plain(text.strip().split("\n", 1)[0])
    for candidate in (whole, first):
        if candidate and known.count(candidate) == 1:
            return known.index(candidate)
    begun = [i for i, k in enumerate(known) if k and re.match(re.escape(k) + r"(?!\w)", whole)]
    if begun:
        longest = max(len(known[i]) for i in begun)
        best = [i for i in begun if len(known[i]) == longest]
        return best[0] if len(best) == 1 else None
    letter = _LETTER_FIRST.match(text.strip()) or _LETTER_NAMED.search(text)
    if letter and (index := ord(letter.group(1)) - ord("A")) < len(choices):
        return index
    inside = [i for i, k in enumerate(known) if k and re.search(r"(?<!\w)" + re.escape(k) + r"(?!\w)", whole)]
    return inside[0] if len(inside) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,:;!?\"'`*()")


def last_number(text: str) -> Decimal | None:
    """The last number that a text holds, thousands separated by commas or not; None without any.

    >>> last_number("3 apples and 4 make 1,007.50 in all."), last_number("none")
    (Decimal('1007.50'), None)
    """
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None
