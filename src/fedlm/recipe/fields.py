"""Walking the schema by dotted path: which fields exist where, for hints, overrides and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that an annotation mentions, e.g. [SourceSpec] for list[SourceSpec] | None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def literals_in(annotation: Any) -> list[str]:
    """The texts that an annotation's Literals allow."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in literals_in(part)]


def annotation_at(model: type[BaseModel], path: Sequence[str | int]) -> Any:
    """The annotation at a path below a model, or None where the schema knows no such path."""
    annotation: Any = model
    for part in path:
        if isinstance(part, int):
            annotation = _item(annotation)
        else:
            found = models_in(annotation) if not is_list(annotation) else []
            if found:
                fields = found[0].model_fields
                annotation = fields[part].annotation if part in fields else None
            else:
                annotation = _value(annotation)
        if annotation is None:
            return None
    return annotation


def model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel] | None:
    """The model whose fields stand at a path, or None."""
    annotation = annotation_at(model, path) if path else model
    found = models_in(annotation) if annotation is not None and not is_list(annotation) else []
    return found[0] if found else None


def parts(annotation: Any) -> list[Any]:
    """The members of a union (without None and Annotated), or the annotation alone."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return parts(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [p for member in get_args(annotation) if member is not type(None) for p in parts(member)]
    return [annotation]


def is_list(annotation: Any) -> bool:
    """Whether an annotation allows a list."""
    return any(get_origin(part) in (list, tuple) for part in parts(annotation))


def _item(annotation: Any) -> Any:
    for part in parts(annotation):
        if get_origin(part) in (list, tuple):
            return get_args(part)[0]
    return None


def _value(annotation: Any) -> Any:
    for part in parts(annotation):
        if get_origin(part) is dict:
            return get_args(part)[1]
    return None
