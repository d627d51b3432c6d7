"""Whether a coordinator and a silo may work on one run: by their versions, and by the model's bytes."""

from __future__ import annotations

from typing import Any

import fedlm
from fedlm.federation.silo.door import PROTOCOL
from fedlm.messages import Fields

SCHEMA = 1
"""Version of the recipe that this fedlm reads."""


class MismatchError(Exception):
    """The two sides are not of one version, or not about one model."""


def compatible(a: str, b: str) -> bool:
    """Whether two versions of fedlm may work on one run: the same one; from 1.0 on, the same major version.

    >>> compatible("0.1.0", "0.1.1"), compatible("1.2.0", "1.4.1")
    (False, True)
    """
    majors = [version.split(".")[0] for version in (a, b)]
    return a == b or (majors[0] == majors[1] and majors[0].isdecimal() and int(majors[0]) >= 1)


def check_versions(fields: Fields) -> None:
    """Compare what `hello` says of the coordinator with what this silo has; the recipe is not read before this.

    Raises:
        MismatchError: naming both sides' version.
    """
    theirs = fields.get("protocol")
    if theirs != PROTOCOL:
        raise MismatchError(f"this silo speaks protocol {PROTOCOL}, the coordinator {_said(theirs)}")
    theirs = fields.get("fedlm")
    if not isinstance(theirs, str) or not compatible(theirs, fedlm.__version__):
        raise MismatchError(f"this silo has fedlm {fedlm.__version__}, the coordinator {_said(theirs)}")
    schema, recipe = fields.get("schema"), fields.get("recipe")
    written = recipe.get("schema_version", schema) if isinstance(recipe, dict) else schema
    if schema != SCHEMA or written != SCHEMA:
        theirs = schema if schema != SCHEMA else written
        raise MismatchError(f"this silo reads recipes of schema {SCHEMA}, the coordinator's has {_said(theirs)}")


def check_fingerprint(theirs: Any, ours: dict[str, str]) -> None:
    """Raises:
    MismatchError: base weights or tokenizer are not the coordinator's, with the beginnings of both hashes.
    """
    for part, what in (("weights", "base model"), ("tokenizer", "tokenizer")):
        said = theirs.get(part) if isinstance(theirs, dict) else None
        if said != ours[part]:
            raise MismatchError(
                f"the {what} here is not the coordinator's: SHA-256 {ours[part][:12]} here, {_said(said)[:12]} there"
            )


def _said(value: Any) -> str:
    """What the other side said, fit for a sentence."""
    return "says nothing" if value is None else str(value)[:40]
