"""Recipe text -> plain data, remembering the line of everything.

Only YAML's own types are built: no tags, no objects, and aliases cannot multiply a small file into a large one. Size,
depth and numbers are bounded while the file is read, since reading is slow: 20,000 nodes take a second or two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from fedlm.errors import RecipeError

Path = tuple[str | int, ...]

_LIMIT_BYTES = 1_000_000
_LIMIT_NODES = 20_000
_LIMIT_DEPTH = 30
_LIMIT_INTEGER = 2**63
"""Python refuses to write down integers of some thousand digits, so none may get so far."""
_PREFIX = "tag:yaml.org,2002:"


@dataclass
class Tree:
    """Plain data (dict, list, str, int, float, bool, None) and where each part of it was written."""

    data: Any
    places: dict[Path, str] = field(default_factory=dict)
    """Place of each key or item, e.g. 'recipe.yaml:12' or '--set training.lr'; () is the whole file."""

    def place(self, path: Sequence[str | int]) -> str:
        """The place of this path or of the nearest thing above it."""
        known = tuple(path)
        while known not in self.places and known:
            known = known[:-1]
        return self.places.get(known, "recipe")


def parse_yaml(text: str, name: str, *, what: str = "recipe", example: str = "`fedlm init`") -> Tree:
    """Parse one YAML document whose top level is a mapping.

    Args:
        text: the file's text.
        name: what to call the file in errors and places.
        what: the kind of file, for errors.
        example: the command that writes one to start from.

    Raises:
        RecipeError: not YAML, a repeated key, a tag, an endless alias, or too large; with file and line.
    """
    if len(text) > _LIMIT_BYTES:
        raise RecipeError(f"a {what} of {len(text):,} characters is not a {what} (limit {_LIMIT_BYTES:,})", where=name)
    try:
        root = _reader().compose(text)
    except _TooLargeError as error:
        raise RecipeError(error.what, where=f"{name}:{error.line}") from None
    except MarkedYAMLError as error:
        raise _syntax_error(error, text, name) from None
    except KeyError:  # of the library's table of versions
        raise RecipeError("this is not YAML 1.1 or 1.2: it asks for another version", where=name) from None
    except (YAMLError, RecursionError, ValueError) as error:
        # the reader's errors carry no line, e.g. control characters; deep nesting ends in RecursionError
        reason = "nested too deeply" if isinstance(error, RecursionError) else "it holds characters that YAML forbids"
        raise RecipeError(f"this is not YAML: {reason}", where=name) from None
    if root is None:
        raise RecipeError(f"the {what} is empty", where=name, fix=f"{example} writes one to start from")
    if not isinstance(root, MappingNode):
        raise RecipeError(f"a {what} is a mapping of fields to values", where=f"{name}:1", fix=f"see {example}")
    tree = Tree(None, {(): f"{name}:{root.start_mark.line + 1}"})
    tree.data = _Builder(name, tree.places).build(root, (), 0)
    return tree


def parse_value(text: str, where: str) -> Any:
    """One value of `--set`, written as YAML: 3 is a number, [a, b] a list, anything else text."""
    try:
        root = _reader().compose(text)
    except (YAMLError, RecursionError, ValueError, KeyError, _TooLargeError):
        raise RecipeError(f"cannot read {text!r} as a YAML value", where=where, fix="quote it") from None
    return None if root is None else _Builder(where, {}).build(root, (), 0)


def check_plain(data: Any, where: str) -> None:
    """Hold plain data from elsewhere to the bounds of a file: values, depth, integers, and text that can be written.

    Raises:
        RecipeError: they are beyond; says which.
    """
    left: list[tuple[Any, int]] = [(data, 0)]
    nodes = 0
    while left:
        value, depth = left.pop()
        nodes += 1
        if nodes > _LIMIT_NODES or depth > _LIMIT_DEPTH:
            raise RecipeError(f"this is nested too deeply, or of more than {_LIMIT_NODES:,} values", where=where)
        if isinstance(value, dict):
            left += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            left += [(part, depth + 1) for part in value]
        elif isinstance(value, int) and abs(value) >= _LIMIT_INTEGER:
            raise RecipeError("this holds a number that is too large", where=where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise RecipeError("this holds a number that is not finite", where=where)
        elif isinstance(value, str) and _torn(value):
            raise RecipeError("this holds half a surrogate pair, which is no character", where=where)


def _torn(text: str) -> bool:
    """Whether a text holds half a surrogate pair."""
    return not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)


class _TooLargeError(Exception):
    def __init__(self, what: str, line: int) -> None:
        self.what, self.line = what, line
        super().__init__(what)


class _Bounded(Composer):
    """Ends before a file of too many or too deep nodes is read to its end."""

    nodes = depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.nodes, self.depth = self.nodes + 1, self.depth + 1
        if self.nodes > _LIMIT_NODES or self.depth > _LIMIT_DEPTH + 1:
            what = "nested too deeply" if self.nodes <= _LIMIT_NODES else f"of more than {_LIMIT_NODES:,} values"
            raise _TooLargeError(f"this file is {what}", self.parser.peek_event().start_mark.line + 1)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _reader() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _Bounded
    return yaml


class _Builder:
    def __init__(self, name: str, places: dict[Path, str]) -> None:
        self.name, self.places, self.nodes = name, places, 0
        self.scalars = YAML(typ="safe", pure=True).constructor

    def build(self, node: Node, path: Path, depth: int) -> Any:
        where = f"{self.name}:{node.start_mark.line + 1}"
        self.nodes += 1
        if self.nodes > _LIMIT_NODES or depth > _LIMIT_DEPTH:
            raise RecipeError("this file grows too large when its aliases are followed", where=where)
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            if node.tag != _PREFIX + "seq":
                raise _tag_error(node, where)
            for index, item in enumerate(node.value):
                self.places[(*path, index)] = f"{self.name}:{item.start_mark.line + 1}"
            return [self.build(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, where)

    def _mapping(self, node: MappingNode, path: Path, depth: int) -> dict[str, Any]:
        if node.tag != _PREFIX + "map":
            raise _tag_error(node, f"{self.name}:{node.start_mark.line + 1}")
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise RecipeError("a key must be a plain word", where=f"{self.name}:{line}")
            key = key_node.value
            if key in result:
                raise RecipeError(
                    f"'{'.'.join(map(str, (*path, key)))}' is given twice, first on line {lines[key]}",
                    where=f"{self.name}:{line}",
                    fix="remove one of them",
                )
            lines[key] = line
            self.places[(*path, key)] = f"{self.name}:{line}"
            result[key] = self.build(value, (*path, key), depth + 1)
        return result

    def _scalar(self, node: ScalarNode, where: str) -> Any:
        kind = str(node.tag).removeprefix(_PREFIX)
        if kind == "timestamp":  # a date is text to a recipe
            return node.value
        if kind not in ("str", "int", "float", "bool", "null"):
            raise _tag_error(node, where)
        try:
            value = self.scalars.construct_object(node)
        except (YAMLError, ValueError, KeyError, ArithmeticError):
            raise RecipeError(
                f"'{node.value[:40]}' is not a {kind}", where=where, fix="quote it if it is text"
            ) from None
        if kind == "str" and _torn(value):
            raise RecipeError("this text holds half a surrogate pair, which is no character", where=where)
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(f"'{node.value[:40]}' is not a finite number", where=where)
        if kind == "int" and abs(value) >= _LIMIT_INTEGER:
            raise RecipeError(f"'{node.value[:40]}' is too large a number", where=where, fix="quote it if it is text")
        return value


def _tag_error(node: Node, where: str) -> RecipeError:
    return RecipeError(f"the YAML tag '{node.tag}' is not allowed in a recipe", where=where, fix="remove the tag")


def _syntax_error(error: MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    rows = text.splitlines()
    written = rows[line] if line < len(rows) else ""
    if "\t" in written[: len(written) - len(written.lstrip())]:
        return RecipeError("a tab indents this line, which YAML forbids", where=f"{name}:{line + 1}", fix="use spaces")
    problem = error.problem or "it cannot be parsed"
    if "another document" in problem:
        return RecipeError(
            "the file holds more than one YAML document", where=f"{name}:{line + 1}", fix="keep one recipe per file"
        )
    fix = None
    if "mapping values are not allowed" in problem:
        fix = "quote a value that holds ': ', and check the indentation"
    elif "cannot start any token" in problem:
        fix = "quote a value that begins with a special character"
    context = f" ({error.context}, line {error.context_mark.line + 1})" if error.context and error.context_mark else ""
    return RecipeError(f"this is not YAML: {problem}{context}", where=f"{name}:{line + 1}", fix=fix)
