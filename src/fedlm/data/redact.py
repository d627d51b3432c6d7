"""Personal data in rows: found by patterns that checksums confirm, replaced by their kind, counted and never logged.

Own patterns, and the `phonenumbers` library. The recognisers of presidio-analyzer know more kinds, but that package
loads spaCy wherever it is used, and what it recognises e-mail addresses with asks the network for a list of domains,
which a silo must not.

Checksums: IBAN, ISO 13616 (mod 97); cards, ISO/IEC 7812-1 (Luhn); the German tax number, ISO 7064 mod 11,10 over eleven
digits of which among the first ten one stands two or three times; the Spanish DNI and NIE, a letter for the number mod
23. The US social security number has none, and is found by its form and the groups that are never issued.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fedlm.errors import MissingExtra
from fedlm.recipe.redact import RedactSpec

Span = tuple[int, int]


@dataclass(frozen=True)
class _Kind:
    pattern: re.Pattern[str]
    shortened: Callable[[str], int]
    """How many of a match's characters are one of these; 0 for none."""
    needs: str = ""
    """A character without which there is nothing to look for."""


class Redactor:
    """Replaces what a spec names, and counts it.

    Raises:
        MissingExtra: phone numbers are to be found, and the library for it is not installed.

    Attributes:
        counts: what was replaced so far, by kind.
    """

    def __init__(self, spec: RedactSpec) -> None:
        if "phone" in spec.kinds and importlib.util.find_spec("phonenumbers") is None:
            raise MissingExtra("finding telephone numbers (data.redact.kinds: phone)", "redact")
        self._spec, self.counts = spec, Counter[str]()

    def example(self, example: Mapping[str, Any]) -> dict[str, Any]:
        """The same example without personal data in any of its texts; numbers and roles stay."""
        known: dict[tuple[str, str], int] = {}
        return {name: self._value(value, known) for name, value in example.items()}

    def text(self, text: str, known: dict[tuple[str, str], int] | None = None) -> str:
        """The text with every find replaced.

        Args:
            known: the finds of this row so far, by kind and value, with their numbers.
        """
        parts, at = [], 0
        for start, stop, kind in sorted(self._found(text)):
            self.counts[kind] += 1
            parts += [text[at:start], self._mark(kind, text[start:stop], {} if known is None else known)]
            at = stop
        return "".join([*parts, text[at:]])

    def finds(self, text: str) -> list[tuple[str, str]]:
        """What `text` would replace, in its order: kind and value. Not counted."""
        return [(kind, text[start:stop]) for start, stop, kind in sorted(self._found(text))]

    def _value(self, value: Any, known: dict[tuple[str, str], int]) -> Any:
        if isinstance(value, str):
            return self.text(value, known)
        if isinstance(value, Mapping):
            return {name: part if name == "role" else self._value(part, known) for name, part in value.items()}
        return [self._value(part, known) for part in value] if isinstance(value, list) else value

    def _mark(self, kind: str, value: str, known: dict[tuple[str, str], int]) -> str:
        name = kind.upper()
        if not self._spec.numbered:
            return f"[{name}]"
        key = (kind, re.sub(r"[\s().-]", "", value).casefold())
        number = known.setdefault(key, 1 + sum(other == kind for other, _ in known))
        return f"[{name}_{number}]"

    def _found(self, text: str) -> list[tuple[int, int, str]]:
        """Finds that do not overlap; of overlapping ones that of the kind which comes first in the table."""
        found: list[tuple[int, int, str]] = []
        taken, digits = bytearray(len(text)), re.search("[0-9]", text) is not None

        def take(spans: Iterator[Span], name: str) -> None:
            for start, stop in spans:
                if not any(taken[start:stop]):
                    taken[start:stop] = b"\1" * (stop - start)
                    found.append((start, stop, name))

        for name, kind in _KINDS.items():
            if name in self._spec.kinds and (kind.needs in text if kind.needs else digits):
                take(_matches(kind, text), name)
        if "phone" in self._spec.kinds and digits:
            take(_phones(text, self._spec.phone_regions), "phone")
        return found


def _matches(kind: _Kind, text: str) -> Iterator[Span]:
    at = 0
    while (match := kind.pattern.search(text, at)) is not None:
        length = kind.shortened(match[0])
        if length:
            yield match.start(), match.start() + length
        at = match.start() + (length or 1)


def _phones(text: str, regions: list[str]) -> Iterator[Span]:
    """Numbers of a numbering plan, written in its groups or in none; without a region those with "+" alone."""
    import phonenumbers

    def dialled(written: str) -> bool:
        abroad = written.startswith("+")
        if not abroad and sum(letter.isdigit() for letter in written) < 10 and not re.search(r"[ ()/\-]", written):
            return False  # a date, an amount or an identifier more often than a number
        for region in [None] if abroad else regions:
            with contextlib.suppress(phonenumbers.NumberParseException):
                if phonenumbers.is_valid_number(phonenumbers.parse(written, region)):
                    strict = phonenumbers.PhoneNumberMatcher(written, region, phonenumbers.Leniency.STRICT_GROUPING)
                    return abroad or strict.has_next()
        return False

    for match in _DIALLED.finditer(text):
        if length := _longest(dialled)(match[0]):
            yield match.start(), match.start() + length


_DIALLED = re.compile(r"(?<![\w.+/=\-])(?:\+|\()?[0-9](?:[ ().\-/]{0,2}[0-9]){6,16}(?![\w])")


def _longest(check: Callable[[str], bool]) -> Callable[[str], int]:
    """Of a match that may have run into words or numbers behind it, the longest beginning that is one of these."""

    def shortened(match: str) -> int:
        ends = [len(match), *(gap.start() for gap in reversed(list(re.finditer(r"[ \-]", match))))]
        return next((end for end in ends if check(match[:end])), 0)

    return shortened


def _whole(check: Callable[[str], bool]) -> Callable[[str], int]:
    return lambda match: len(match) if check(match) else 0


def is_iban(text: str) -> bool:
    """Whether this is an IBAN: but for spaces 15 to 34 letters and digits, 1 mod 97 when moved as ISO 13616 says."""
    text = text.replace(" ", "")
    if not 15 <= len(text) <= 34 or not re.fullmatch("[A-Z]{2}[0-9]{2}[A-Z0-9]+", text):
        return False
    return int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1


_ISSUED = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15}|[0-9]{18})|(?:5[1-5]|35|6[0-9])[0-9]{14}|3[47][0-9]{13}|3[0689][0-9]{12}"
    r"|(?:222[1-9]|22[3-9][0-9]|2[3-6][0-9]{2}|27[01][0-9]|2720)[0-9]{12}"
)
"""First digits and lengths that the large issuers use."""


def is_card(text: str) -> bool:
    """Whether these digits are a card's number: 13 to 19 of them, of an issuer's range, that add up by Luhn's rule."""
    plain = re.sub("[^0-9]", "", text)
    if not _ISSUED.fullmatch(plain):
        return False
    digits = [int(letter) for letter in plain]
    doubled = [digit if i % 2 == 0 else sum(divmod(2 * digit, 10)) for i, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def is_ip(text: str) -> bool:
    """Whether this is an IPv4 or IPv6 address, other than '::'."""
    try:
        return not ipaddress.ip_address(text).is_unspecified
    except ValueError:
        return False


def is_steuer_id(text: str) -> bool:
    """Whether these digits are a German tax number (Identifikationsnummer)."""
    digits = [int(letter) for letter in text if letter.isdigit()]
    repeated = sorted(count for count in Counter(digits[:10]).values() if count > 1)
    if len(digits) != 11 or digits[0] == 0 or repeated not in ([2], [3]):
        return False
    product = 10
    for digit in digits[:10]:
        product = ((digit + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == digits[10]


def is_dni(text: str) -> bool:
    """Whether this is a Spanish DNI or NIE."""
    plain = text.replace("-", "").upper()
    number = {"X": "0", "Y": "1", "Z": "2"}.get(plain[0], plain[0]) + plain[1:-1]
    return number.isdigit() and "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == plain[-1]


_KINDS: dict[str, _Kind] = {
    "url": _Kind(
        re.compile(r"\b[A-Za-z][A-Za-z0-9+.\-]{1,20}://[^\s/:@]{1,100}:[^\s/@]{1,100}@[^\s\"'<>)\]]{1,500}"), len, "://"
    ),
    "email": _Kind(
        re.compile(
            r"(?<![\w.%+\-])[A-Za-z0-9_](?:[\w.%+\-]{0,62}[\w%+\-])?"
            r"@(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![\w\-])",
            re.ASCII,
        ),
        len,
        "@",
    ),
    "iban": _Kind(re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]){11,30}\b"), _longest(is_iban)),
    "card": _Kind(re.compile(r"(?<![\w.])[2-6](?:[ \-]?[0-9]){12,18}(?!\w)"), _longest(is_card)),
    "ssn": _Kind(re.compile(r"(?<![\w\-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![\w\-])"), len, "-"),
    "steuer_id": _Kind(re.compile(r"(?<![\w.])[1-9][0-9](?: ?[0-9]{3}){3}(?![\w])"), _whole(is_steuer_id)),
    "dni": _Kind(re.compile(r"(?<![\w\-])(?:[0-9]{8}|[XYZxyz]-?[0-9]{7})-?[A-Za-z](?![\w\-])"), _whole(is_dni)),
    "ip": _Kind(
        re.compile(
            r"(?<![\w.:])(?:(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?!\.?[0-9])|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w:])"
        ),
        _whole(is_ip),
    ),
}
"""In the order in which they are looked for."""
