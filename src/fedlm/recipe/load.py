"""YAML file -> Recipe, and every reason why not, each with file, line, field and the nearest valid name."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from fedlm.errors import RecipeError, nearest
from fedlm.recipe.fields import annotation_at, is_list, literals_in, model_at
from fedlm.recipe.presets import SCHEME
from fedlm.recipe.schema import Recipe
from fedlm.recipe.start import SHORT, check_finished, inherit, normalise, wanted
from fedlm.recipe.yamltree import Path as Dotted
from fedlm.recipe.yamltree import Tree, parse_value, parse_yaml

M = TypeVar("M", bound=BaseModel)

MOST_FAULTS = 50
"""Faults that are explained; looking for the nearest names of a hundred thousand unknown fields takes minutes."""


class InvalidRecipeError(RecipeError):
    """One or several faults of a recipe, each a line 'file:line: field: reason'."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(_stop(p) for p in problems))


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    Args:
        path: a YAML file.
        overrides: 'dotted.path=value' each, the value written as YAML; a number in the path is a list index.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or asks for something unknown or impossible. All faults that
            validation finds are listed, one per line (`InvalidRecipeError`).
    """
    path = Path(path)
    return complete(read_tree(path, overrides), path.parent)


def complete(tree: Tree, folder: Path) -> Recipe:
    """The recipe of parsed data in a folder, with what it inherits of the run that it starts from; raises as
    `load_recipe`."""
    if (text := wanted(tree)) is not None:
        run = _run_folder(text, folder, "start.run")
        check_finished(run, tree.place(("start", "run")))
        inherit(tree, load_recipe(run / "recipe.yaml"), str(run))
    return from_folder(build_recipe(tree), folder)


def read_tree(path: Path, overrides: Sequence[str] = ()) -> Tree:
    """A recipe's data as written, with overrides applied; raises as `load_recipe`."""
    tree = parse_yaml(_read(path), str(path))
    normalise(tree)
    for override in overrides:
        set_value(tree, override)
    return tree


def build_recipe(tree: Tree) -> Recipe:
    """Validate parsed data that inherits nothing any more; raises as `load_recipe`."""
    try:
        return Recipe.model_validate(tree.data)
    except ValidationError as error:
        raise InvalidRecipeError(list(_explain(error, tree))) from None


def load_yaml(path: str | Path, schema: type[M], *, what: str, example: str) -> M:
    """Read another of fedlm's YAML files, such as a policy, with the same care as a recipe.

    Args:
        path: a YAML file.
        schema: what it must be.
        what: the kind of file, for errors.
        example: the command that writes one to start from.

    Raises:
        RecipeError: as `load_recipe`.
    """
    path = Path(path)
    tree = parse_yaml(_read(path, what, example), str(path), what=what, example=example)
    try:
        return schema.model_validate(tree.data)
    except ValidationError as error:
        raise InvalidRecipeError(list(_explain(error, tree, schema))) from None


def from_folder(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the local paths of its model, its start and its reward model, written relative to the recipe's
    folder, made absolute.

    A run directory can then be used from any working directory. Names of known models and 'scheme:' sources stay.
    """
    spec, changed = recipe.model, {}
    for field in ("source", "tokenizer", "chat_template"):
        text = getattr(spec, field)
        if text is None or text.startswith(("hub:", "pypi:", "npm:", SCHEME)):
            continue
        try:
            local = folder / Path(text).expanduser()
            if "/" in text or local.exists() or local.suffix in (".gguf", ".jinja"):
                changed[field] = str(local.resolve())
        except (OSError, RuntimeError, ValueError) as fault:  # a name too long, an unknown ~user, a NUL
            reason = (fault.strerror if isinstance(fault, OSError) else str(fault)) or type(fault).__name__
            raise RecipeError(f"this path cannot be used: {reason}", where=f"model.{field}", fix="correct it") from None
    recipe = recipe.model_copy(update={"model": spec.model_copy(update=changed)}) if changed else recipe
    if recipe.start is not None:
        run = str(_run_folder(recipe.start.run, folder, "start.run"))
        recipe = recipe.model_copy(update={"start": recipe.start.model_copy(update={"run": run})})
    if recipe.reinforce.reward.run is not None:
        run = str(_run_folder(recipe.reinforce.reward.run, folder, "reinforce.reward.run"))
        reward = recipe.reinforce.reward.model_copy(update={"run": run})
        recipe = recipe.model_copy(update={"reinforce": recipe.reinforce.model_copy(update={"reward": reward})})
    return recipe


def _run_folder(text: str, folder: Path, where: str) -> Path:
    """The run that a recipe in this folder names, absolute."""
    try:
        return (folder / Path(text).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as fault:  # as for a model's path
        raise RecipeError(f"this path cannot be used: {fault}", where=where, fix="correct it") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out. Loads back equal."""
    data = recipe.model_dump(mode="json")
    text = _dump(data, readable=True)
    # YAML takes these three for line breaks, so a text that holds one is written with every such letter escaped.
    return _dump(data, readable=False) if re.search("[\x85\u2028\u2029]", text) else text


def _dump(data: Any, readable: bool) -> str:
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    yaml.allow_unicode = readable
    yaml.dump(data, stream)
    return stream.getvalue()


def recipe_hash(recipe: Recipe) -> str:
    """Hex SHA-256 of the resolved recipe; independent of comments, order and defaults left out."""
    return digest_of(recipe.model_dump(mode="json"))


def digest_of(data: dict[str, Any]) -> str:
    """Hex SHA-256 of a recipe's data as they are: `recipe_hash` where they are complete."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def diff_recipes(a: Recipe, b: Recipe) -> list[str]:
    """What changed from a to b, e.g. ['training.lr: 0.0005 -> 0.001']; empty when they are equal."""
    before, after = dict(_flat(a.model_dump(mode="json"), "")), dict(_flat(b.model_dump(mode="json"), ""))
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {_shown(before, name)} -> {_shown(after, name)}"
        for name in names
        if _shown(before, name) != _shown(after, name)
    ]


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{path}.{index}")
    else:
        yield path, value


def _shown(flat: dict[str, Any], name: str) -> str:
    return json.dumps(flat[name], ensure_ascii=False) if name in flat else "(absent)"


def _read(path: Path, what: str = "recipe", example: str = "`fedlm init`") -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(path.name, near) + " " if near else ""
        hint = hint if hint.startswith("did") else ""
        raise RecipeError(
            "there is no such file", where=str(path), fix=f"{hint}{example} writes a {what} to start from"
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"this is a folder, a {what} is a YAML file", where=str(path)) from None
    except OSError as error:
        raise RecipeError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(
            f"the file is not UTF-8 text (byte 0x{data[error.start]:02x})",
            where=f"{path}:{line}",
            fix="save it as UTF-8",
        ) from None


def set_value(tree: Tree, override: str) -> None:
    """Set one value in the raw data, making the mappings on the way; the path must exist in the schema."""
    where = f"--set {override}"
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError("an override is written path=value", where=where, fix="for instance --set training.lr=1e-4")
    path: list[str | int] = []
    here = tree.data
    pieces = ["start", "run"] if dotted.strip() == SHORT else dotted.strip().split(".")
    for position, piece in enumerate(pieces):
        model = model_at(Recipe, path)
        last = position == len(pieces) - 1
        if isinstance(here, list):
            if not re.fullmatch("[0-9]{1,9}", piece) or int(piece) >= len(here):
                what = f"'{'.'.join(map(str, path))}' is a list of {len(here)}: use an index 0 to {len(here) - 1}"
                empty = f"'{'.'.join(map(str, path))}' is empty: there is no item to change"
                raise RecipeError(f"{what}, not '{piece}'" if here else empty, where=where)
            path.append(int(piece))
        else:
            if model is not None and piece not in model.model_fields:
                name = ".".join(map(str, [*path, piece]))
                raise RecipeError(f"unknown field '{name}': {nearest(piece, model.model_fields)}", where=where)
            if not isinstance(here, dict) or annotation_at(Recipe, [*path, piece]) is None:
                raise RecipeError(f"'{'.'.join(map(str, path))}' has no fields below it", where=where)
            path.append(piece)
        key: Any = path[-1]
        if last:
            here[key] = parse_value(text, where)
        else:
            if isinstance(here, dict) and here.get(key) is None:
                here[key] = [] if is_list(annotation_at(Recipe, path)) else {}
            here = here[key]
    for known in [p for p in tree.places if p[: len(path)] == tuple(path)]:
        del tree.places[known]
    tree.places[tuple(path)] = f"--set {dotted}"


def _explain(error: ValidationError, tree: Tree, schema: type[BaseModel] = Recipe) -> Iterator[str]:
    """Each fault once, in the order of the file. A union's several complaints about one value become one."""
    reasons: dict[Dotted, list[str]] = {}
    faults = error.errors(include_url=False)
    for fault in faults[:MOST_FAULTS]:
        kind, loc, context = fault["type"], fault["loc"], fault.get("ctx", {})
        if kind == "impossible":
            for below, reason in context["problems"]:
                reasons.setdefault((*loc, *below), []).append(reason)
            continue
        path, value = _real_path(tree.data, loc, kind)
        reasons.setdefault(path, []).append(_reason(kind, str(fault["msg"]), path, value, context, schema))
    for path, told in sorted(reasons.items(), key=lambda item: _line(tree.place(item[0]))):
        name = ".".join(map(str, path))
        reason = _joined(list(dict.fromkeys(told)))
        yield f"{tree.place(path)}: {name}: {reason}" if name else f"{tree.place(path)}: {reason}"
    if len(faults) > MOST_FAULTS:
        yield f"{tree.place(())}: there are {len(faults) - MOST_FAULTS} faults more"


def _line(place: str) -> int:
    """The line number of a place; overrides, which have none, come last."""
    number = place.rpartition(":")[2]
    return int(number) if re.fullmatch("[0-9]{1,9}", number) else 1_000_000


def _joined(reasons: list[str]) -> str:
    """One sentence from what each member of a union complains about: "must be 'all', a valid integer or ..."."""
    wanted = [m for m in (re.fullmatch(r"must be (.*?), got (.*)", reason, re.DOTALL) for reason in reasons) if m]
    if len(reasons) == 1 or len(wanted) < len(reasons):
        return "; ".join(reasons)
    *first, last = dict.fromkeys(m[1] for m in wanted)
    return f"must be {', '.join(first)}{' or ' if first else ''}{last}, got {wanted[-1][2]}"


def _real_path(data: Any, loc: Sequence[str | int], kind: str) -> tuple[Dotted, Any]:
    """Drop pydantic's names of union members from a location; the value that stands there."""
    path: list[str | int] = []
    for position, part in enumerate(loc):
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            path.append(part)
            data = data[part]
        elif kind == "missing" and position == len(loc) - 1:
            path.append(part)
            data = None
    return tuple(path), data


def _reason(kind: str, message: str, path: Dotted, value: Any, context: dict[str, Any], schema: type[BaseModel]) -> str:
    if kind == "extra_forbidden":
        model = model_at(schema, path[:-1])
        hint = nearest(str(path[-1]), model.model_fields) if model else "remove it"
        return f"unknown field, {hint}"
    if kind == "missing":
        return "this field is required and missing"
    if kind == "literal_error":
        valid = literals_in(annotation_at(schema, path))
        if isinstance(value, str) and len(valid) > 1:
            hint = nearest(value, valid)
            everything = "" if hint.startswith("valid") else f" (valid: {', '.join(valid)})"
            return f"unknown value '{_short(value)}', {hint}{everything}"
        return f"must be {context.get('expected', message)}, got {_short(value)}"
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if kind in ("model_type", "dict_type"):
        return f"must be a mapping of fields, got {_short(value)}"
    if kind == "string_pattern_mismatch":
        return f"'{_short(value)}' does not fit {_PATTERNS.get(context['pattern'], context['pattern'])}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f"must be text, got {_short(value)}: quote it"
    if kind == "string_type" and isinstance(value, dict):
        return "must be text, got a mapping: quote a text that begins with {"
    if kind == "string_too_short":
        return "must not be empty"
    text = re.sub(r"^Input should be", "must be", message)
    return f"{text[0].lower()}{text[1:]}, got {_short(value)}"


_PATTERNS = {
    "^[0-9a-f]{64}$": "a SHA-256: 64 lower-case hexadecimal digits",
    "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$": "a name: up to 64 letters, digits, '.', '_' or '-'",
}


def _short(value: Any) -> str:
    """A recipe's value for an error, cut to 60 characters."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = " ".join(text.split())
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"the text '{text}'" if isinstance(value, str) and re.fullmatch(r"[-+0-9.e]+|true|false", text) else text


def _stop(line: str) -> str:
    return line if line.endswith((".", "?", "!")) else line + "."
