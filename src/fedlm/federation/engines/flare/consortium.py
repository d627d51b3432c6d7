"""consortium.yaml: who takes part in a network, and where the coordinator listens."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator

from fedlm.errors import FedlmError, NetworkError, nearest
from fedlm.recipe.yamltree import Tree, parse_yaml

# NVFlare's own rules for names, and no name longer than a certificate can hold
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"
_ORG = r"^[A-Za-z0-9_]+$"
_HOST = r"^(([A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])\.)*([A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]*[A-Za-z0-9])$"
_OPERATOR = r"^[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}$"
_TAKEN = frozenset({"coordinator", "server", "operator", "operators", "admin", "all"})

Name = Annotated[str, StringConstraints(pattern=_NAME, max_length=40)]
Org = Annotated[str, StringConstraints(pattern=_ORG, max_length=60)]

_HINTS = {
    _NAME: "letters, digits, '-' and '_', beginning with a letter or digit",
    _ORG: "letters, digits and '_'",
    _HOST: "a host name such as fl.example.org, or an IPv4 address",
    _OPERATOR: "of the form of an e-mail address, such as ops@example.org",
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Silo(_Part):
    """An organisation that owns private text."""

    name: Name
    org: Org

    @field_validator("name")
    @classmethod
    def _not_taken(cls, name: str) -> str:
        if name.lower() in _TAKEN:
            raise ValueError(f"'{name}' means something else in a network; choose another name")
        return name


class Coordinator(_Part):
    """Where the rounds are run. `host` must be what silos connect to: it stands in the certificate."""

    host: Annotated[str, StringConstraints(pattern=_HOST, max_length=64)]
    port: int = Field(8002, ge=1, le=65535)
    org: Org


class Operator(_Part):
    """A person at the coordinator. Only the role lead may run federations."""

    name: Annotated[str, StringConstraints(pattern=_OPERATOR, max_length=64)]
    role: Literal["lead", "member"] = "lead"


class Consortium(_Part):
    """All of consortium.yaml."""

    name: Name
    coordinator: Coordinator
    operators: tuple[Operator, ...] = Field((), strict=False)
    silos: tuple[Silo, ...] = Field(min_length=1, strict=False)

    @model_validator(mode="after")
    def _unique(self) -> Consortium:
        for what, names in (("silo", [s.name for s in self.silos]), ("operator", [o.name for o in self.operators])):
            # certificates and folders are named after them, and some file systems ignore case
            twice = sorted({n for n in names if [m.lower() for m in names].count(n.lower()) > 1})
            if twice:
                raise ValueError(f"the {what} name '{twice[0]}' is given twice")
        if self.operators and all(o.role != "lead" for o in self.operators):
            raise ValueError("no operator has the role lead, so nobody could run a federation")
        return self

    def everyone(self) -> tuple[Operator, ...]:
        """The operators; one lead where none is named."""
        if self.operators:
            return self.operators
        domain = re.sub(r"[^A-Za-z0-9]", "-", self.coordinator.org).strip("-") or "coordinator"
        return (Operator(name=f"operator@{domain}.org", role="lead"),)


EXAMPLE = """\
# Who takes part in a network. `fedlm network new consortium.yaml` makes the coordinator's kit and an invitation for
# each silo from it. Nothing in this file is secret.

name: hospitals                  # of the network: letters, digits, '-' and '_'

coordinator:
  host: fl.example.org           # what silos connect to; it stands in the coordinator's certificate
  port: 8002                     # the only port that must be open, and only here
  org: university                # letters, digits and '_'

operators:                       # who may use the coordinator; one lead is made when this is left out
  - {name: ops@example.org, role: lead}        # may run federations
  # - {name: guest@example.org, role: member}  # may look, but not run

silos:                           # one per organisation that owns text; names are unique in the network
  - {name: hospital-a, org: hospital_a}
  - {name: hospital-b, org: hospital_b}
  - {name: hospital-c, org: hospital_c}
"""


def read_consortium(path: Path) -> Consortium:
    """The consortium that a file describes.

    Raises:
        NetworkError: no such file, not YAML, an unknown key, a name that cannot be, or a name given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise NetworkError(
            f"cannot be read: {reason}", where=str(path), fix="`fedlm network new --example` writes one to start from"
        ) from None
    try:
        tree = parse_yaml(text, path.name)
    except FedlmError as error:
        fix = "see `fedlm network new --example`" if "fedlm init" in (error.fix or "") else error.fix
        raise NetworkError(error.what.replace("recipe", "consortium file"), where=error.where, fix=fix) from None
    return check_consortium(tree)


def check_consortium(tree: Tree) -> Consortium:
    """The consortium that parsed YAML describes. Raises NetworkError at the first fault, with its line."""
    try:
        return Consortium.model_validate(tree.data)
    except ValidationError as error:
        raise _sentence(error, tree) from None


def silo(name: str, org: str) -> Silo:
    """A silo by name and organisation. Raises NetworkError: a name that cannot be."""
    try:
        return Silo(name=name, org=org)
    except ValidationError as error:
        raise _sentence(error, Tree({}, {(): "silo"})) from None


def _sentence(error: ValidationError, tree: Tree) -> NetworkError:
    # a misspelt key first: that another one is missing is only its consequence
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place, kind = [p for p in first["loc"] if isinstance(p, str | int)], first["type"]
    field = ".".join(map(str, place))
    fix: str | None = None
    if kind == "extra_forbidden":
        what = f"'{field}' is not known here"
        fix = nearest(str(place[-1]), _fields(place[:-1]))
    elif kind == "missing":
        what = f"'{field}' is missing"
    elif kind == "string_pattern_mismatch":
        pattern = str(first["ctx"]["pattern"])
        what = f"'{field}' cannot be {first['input']!r}: it must be {_HINTS[pattern]}"
    elif kind == "value_error":
        what = str(first["ctx"]["error"])
    else:
        what = f"'{field}': {first['msg'][:1].lower()}{first['msg'][1:]}" if field else first["msg"]
    return NetworkError(what, where=tree.place(place), fix=fix)


def _fields(place: list[Any]) -> list[str]:
    parts: dict[str, type[BaseModel]] = {"coordinator": Coordinator, "operators": Operator, "silos": Silo}
    return list((parts[str(place[0])] if place else Consortium).model_fields)
