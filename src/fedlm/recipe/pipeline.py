"""A pipeline: named stages, each a recipe, each from the final model of the one before.

    name: assistant
    common: {seed: 0, data: ...}        # optional: what inline stages share; or the path of a recipe
    stages:
      pretrain: pretrain.yaml           # a recipe of its own
      instruct: {task: instruct, ...}   # or a part of one, put over `common`: mappings are merged, all else replaced
    measure: [instruct]                 # stages on whose test rows every model is measured

Relative paths start from the pipeline's folder; those of a stage that is a file, from that file's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from fedlm.errors import RecipeError, nearest
from fedlm.recipe.load import build_recipe, complete, from_folder, load_yaml, read_tree, set_value
from fedlm.recipe.schema import Recipe
from fedlm.recipe.start import SHORT, inherit, normalise, refusal
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS
from fedlm.recipe.types import Name
from fedlm.recipe.yamltree import Tree

EXAMPLE = "`fedlm init pipeline`"


class PipelineSpec(Strict):
    """The file as written."""

    name: Name
    common: str | dict[str, Any] = Field(
        default_factory=dict, description="What inline stages share: a part of a recipe, or the path of one."
    )
    stages: dict[Name, str | dict[str, Any]] = Field(
        min_length=1, description="In this order: by name, the path of a recipe, or a part of one."
    )
    measure: list[str] | None = Field(
        None,
        description="Stages on whose test rows every stage's model is measured; default: all whose loss is the "
        "likelihood of text.",
    )


@dataclass(frozen=True)
class Stage:
    """One stage, resolved."""

    name: str
    recipe: Recipe
    base: Path
    """The folder that relative paths of its data start from."""


@dataclass(frozen=True)
class Pipeline:
    """All stages, resolved, before any has run."""

    name: str
    stages: tuple[Stage, ...]
    measure: tuple[str, ...]


def load_pipeline(path: Path, run_dir: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read and resolve a pipeline as it will be run in a directory.

    Args:
        run_dir: each stage's run is a folder of its name in here.
        overrides: 'STAGE.dotted.path=value' each.

    Raises:
        RecipeError: the file or a stage's recipe is impossible; says which, with file and line. Nothing has run then.
    """
    spec = load_yaml(path, PipelineSpec, what="pipeline", example=EXAMPLE)
    _check(spec, path, overrides)
    stages: list[Stage] = []
    for name, text in spec.stages.items():
        here = [o.partition(".")[2] for o in overrides if o.partition(".")[0] == name]
        tree, base = _tree(spec, name, text, path, here)
        if isinstance(text, dict):  # of its own, not that of a common recipe
            tree.data["name"] = text.get("name", f"{spec.name}-{name}"[:64])
        try:
            recipe = _next(tree, stages[-1], run_dir, base) if stages else complete(tree, base)
        except RecipeError as error:
            raise RecipeError(f"stage '{name}': {error.sentence()}") from None
        stages.append(Stage(name, recipe, base))
    return Pipeline(spec.name, tuple(stages), _measured(spec, stages, path))


def pipeline_name(path: Path) -> str:
    """The name in a pipeline's file; raises as `load_pipeline`."""
    return load_yaml(path, PipelineSpec, what="pipeline", example=EXAMPLE).name


def _check(spec: PipelineSpec, path: Path, overrides: Sequence[str]) -> None:
    for name in spec.stages:
        if name in RESERVED:
            raise RecipeError(f"a stage cannot be called '{name}'", where=str(path), fix="choose another name")
    for override in overrides:
        if (stage := override.partition(".")[0]) not in spec.stages:
            raise RecipeError(
                f"there is no stage '{stage}'", where=f"--set {override}", fix=nearest(stage, list(spec.stages))
            )


RESERVED = ("pipeline.json", "measured.json", "report.html")
"""What else lies in a pipeline's directory."""


def _tree(
    spec: PipelineSpec, name: str, written: str | dict[str, Any], path: Path, overrides: Sequence[str]
) -> tuple[Tree, Path]:
    """A stage's data as written, and the folder that its paths start from."""
    if isinstance(written, str):
        file = path.parent / Path(written).expanduser()
        return read_tree(file, overrides), file.parent
    if isinstance(spec.common, str):
        tree = read_tree(path.parent / Path(spec.common).expanduser())
    else:
        tree = Tree(copy.deepcopy(spec.common), {(): f"{path}: common"})
        normalise(tree)
    tree.data = _over(tree.data, written, tree, f"{path}: stages.{name}", ())
    normalise(tree)
    for override in overrides:
        set_value(tree, override)
    return tree, path.parent


def _over(below: Any, above: Any, tree: Tree, place: str, at: tuple[str | int, ...]) -> Any:
    """One value put over another, and where it was written."""
    tree.places[at] = place
    if isinstance(below, dict) and isinstance(above, dict):
        inner = {key: _over(below.get(key), value, tree, place, (*at, key)) for key, value in above.items()}
        return {**below, **inner}
    for known in [p for p in tree.places if len(p) > len(at) and p[: len(at)] == at]:
        del tree.places[known]
    return copy.deepcopy(above)


def _next(tree: Tree, before: Stage, run_dir: Path, base: Path) -> Recipe:
    """A later stage's recipe, from the model that the stage before will have trained."""
    start = tree.data.get("start", {})
    if SHORT in tree.data or not isinstance(start, dict) or "run" in start:
        raise RecipeError(
            f"it starts from the stage before it, '{before.name}', and its recipe names another run",
            where=tree.place(("start",)),
            fix="leave `from` out; `start: {adapter: stack}` may stay",
        )
    tree.data["start"] = dict(start)
    inherit(tree, before.recipe, str((run_dir / before.name).resolve()))
    recipe = from_folder(build_recipe(tree), base)
    assert recipe.start is not None and recipe.start.adapter is not None
    if (why := refusal(before.recipe, recipe, recipe.start.adapter)) is not None:
        raise RecipeError(f"it cannot start from '{before.name}': {why}", where=tree.place(("start",)))
    return recipe


def _measured(spec: PipelineSpec, stages: Sequence[Stage], path: Path) -> tuple[str, ...]:
    able = [s.name for s in stages if TASKS[s.recipe.task].likelihood and s.recipe.data.at_silos is False]
    for name in spec.measure or ():
        if name not in spec.stages:
            raise RecipeError(
                f"there is no stage '{name}'", where=f"{path}: measure", fix=nearest(name, list(spec.stages))
            )
        if name not in able:
            raise RecipeError(
                f"stage '{name}' has no test rows that every model can be measured on: its loss is no likelihood of "
                "text, or its rows are at the silos of a network",
                where=f"{path}: measure",
                fix="leave it out",
            )
    return tuple(able if spec.measure is None else spec.measure)
