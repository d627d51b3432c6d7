"""docs/recipe-reference.md, written from the schema so that it cannot go stale (a test compares them)."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedlm.recipe.fields import models_in, parts
from fedlm.recipe.guards import GUARDS
from fedlm.recipe.methods import ALGORITHMS, Method
from fedlm.recipe.schema import Recipe

_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false"}

_INTRODUCTION = """\
# Recipe reference

A recipe is one YAML file that describes one federation completely. `fedlm init` writes one to start from,
`fedlm recipe check` says what is wrong with it, `fedlm recipe show` prints it with every default filled in.

Unknown fields, wrong types and combinations that cannot be kept are errors with file, line and the nearest valid name.
Settings that would have no effect are errors too. Any field can be set from the command line:
`--set training.lr=1e-4 --set data.sources.0.max_rows=500`.

For completion and checking in an editor: `fedlm recipe schema > recipe.schema.json`, then put
`# yaml-language-server: $schema=recipe.schema.json` on the recipe's first line.

*This page is written by `fedlm recipe reference` from the schema.*
"""


def write_reference() -> str:
    """The page as Markdown."""
    pages = [_INTRODUCTION]
    for prefix, model in _sections(Recipe, "", set()):
        pages.append(_section(prefix, model))
    pages.append(_algorithms())
    pages.append(_guards())
    return "\n".join(pages)


def _sections(model: type[BaseModel], prefix: str, seen: set[type]) -> list[tuple[str, type[BaseModel]]]:
    seen.add(model)
    found = [(prefix, model)]
    for name, field in model.model_fields.items():
        for below in models_in(field.annotation):
            if below not in seen:
                mark = "[]" if any(get_origin(p) is list for p in parts(field.annotation)) else ""
                found += _sections(below, f"{prefix}.{name}{mark}".lstrip("."), seen)
    return found


def _section(prefix: str, model: type[BaseModel]) -> str:
    lines = [f"## {prefix or 'The top level'}", "", " ".join((model.__doc__ or "").split()), ""]
    lines += ["| field | type | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        lines.append(f"| `{name}` | {_type(field)} | {_default(field)} | {_cell(field.description or '')} |")
    return "\n".join([*lines, ""])


_FACTS = """\
What can be combined with an algorithm; anything else is an error that says why. *Adapters* are the values of
`adapter.kind`. *Ranks*: silos may have LoRA factors of different ranks. *Part*: silos may train some layers or modules.
*Personal*: each silo has, and is measured with, a model of its own. *State*: the silo keeps tensors between rounds.
*Guards* compress what goes up; *masks*: the guard `mask` can hide updates in their sum; *way down* are guards of
`federation.downlink`.
"""


def _algorithms() -> str:
    heads = ["`federation.algorithm.name`", "adapters", "ranks", "part", "personal", "state"]
    heads += ["guards", "masks", "way down", "options", "paper"]
    lines = ["## Algorithms", "", _FACTS, f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, m in ALGORITHMS.items():
        facts = (m.mixed_ranks, m.partial, m.personal, m.silo_state)
        down = m.plain_broadcast and not m.asynchronous
        cells = [f"`{name}`", ", ".join(m.adapters), *map(_yes, facts), _compressed(m)]
        cells += [_yes(not m.no_masks), _yes(down)]
        options = [*m.options, *(("server_lr",) if m.server_rate else ())]
        lines.append(f"| {' | '.join([*cells, ', '.join(f'`{o}`' for o in options), m.paper])} |")
    return "\n".join([*lines, ""])


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"


def _compressed(method: Method) -> str:
    """Whether, and how, a method's updates can be compressed."""
    if method.no_guards:
        return "no"
    if method.no_feedback:
        return "without error feedback"
    return "with error feedback" if method.needs_feedback else "yes"


def _guards() -> str:
    lines = ["## Guards", "", "| `name` of a guard | what is sent | paper |", "|---|---|---|"]
    lines += [f"| `{name}` | {facts.does} | {facts.paper} |" for name, facts in GUARDS.items()]
    return "\n".join([*lines, ""])


def _type(field: FieldInfo) -> str:
    words = [_words(part) for part in parts(field.annotation)]
    if not any(get_origin(part) is Literal for part in parts(field.annotation)):
        words[-1] += _bounds(field.metadata)
    return _cell(" or ".join(dict.fromkeys(words)))


def _words(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {' or '.join(dict.fromkeys(_words(p) for p in parts(arguments[0])))}"
    if origin is tuple:
        return f"{len(arguments)} numbers"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "fields below"
    return _WORDS[annotation]


def _bounds(metadata: list[Any]) -> str:
    words = []
    for rule in metadata:
        for kind, sign in ((Gt, ">"), (Ge, ">="), (Lt, "<"), (Le, "<=")):
            if isinstance(rule, kind):
                words.append(f"{sign} {getattr(rule, kind.__name__.lower()):g}")
    return f" ({', '.join(words)})" if words else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "\\n")
