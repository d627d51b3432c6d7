"""The run that a recipe starts from, and what the recipe inherits of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from fedlm.errors import RecipeError
from fedlm.recipe.data_checks import Problem
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.model import AdapterSpec
from fedlm.recipe.strict import Strict
from fedlm.recipe.yamltree import Tree

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

SHORT = "from"
"""A recipe's top-level `from: runs/NAME` is `start: {run: runs/NAME}`."""

Way = Literal["continue", "stack"]


class StartSpec(Strict):
    """The finished run whose final model is this run's first; `from: RUN` is the short form."""

    run: str = Field(min_length=1, description="Its run directory. Model and adapter are its own where left out.")
    adapter: Way | None = Field(
        None,
        description="'continue': go on with its adapter's values; 'stack': they stay as they are, below a fresh "
        "adapter. Default: continue where the adapters are alike, else stack. After a run with `kind: full` its model "
        "is the base, and this is 'continue' with `kind: full` and 'stack' with anything else.",
    )


def start_problems(recipe: Recipe) -> Iterator[Problem]:
    """What can be judged of a start without looking at its run."""
    start = recipe.start
    if start is None:
        return
    if recipe.adapter.kind == "full":
        if start.adapter == "stack":
            yield ("start", "adapter"), "full weights lie below nothing: 'continue', or train an adapter"
        if recipe.model.dtype != "float32":
            yield ("model", "dtype"), "full weights go on from those of another run without rounding: set it to float32"
        return
    why = ALGORITHMS[recipe.federation.algorithm.name].no_continue
    if start.adapter == "continue" and why:
        yield (
            ("start", "adapter"),
            f"'{recipe.federation.algorithm.name}' cannot continue an adapter: {why}; 'stack' it",
        )


def check_finished(run: Path, where: str = "start.run") -> None:
    """Whether a run can be started from.

    Raises:
        RecipeError: there is no run, or it has no final model yet; says how to get one.
    """
    try:
        meta = json.loads((run / "run.json").read_text(encoding="utf-8"))
        status, done = meta["status"], meta["rounds_done"]
    except (FileNotFoundError, NotADirectoryError):
        raise RecipeError(
            f"there is no run in '{run}' to start from (run.json is missing)",
            where=where,
            fix="name the directory of a finished run; the path starts from the recipe's folder",
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(f"the run in '{run}' cannot be read (run.json is damaged)", where=where) from None
    if status != "finished" or not (run / "adapter").is_dir():
        why = f"it is '{status}' after {done} rounds" if status != "finished" else "its folder 'adapter' is missing"
        raise RecipeError(
            f"the run in '{run}' has no final model to start from: {why}",
            where=where,
            fix=f"finish it first: fedlm run --resume {run}" if status != "finished" else "restore it, or run it again",
        )


def normalise(tree: Tree) -> None:
    """Write the short form in full. Faults in it are left to validation, which then names the line of `from`."""
    data = tree.data
    if SHORT not in data or "start" in data:
        return
    data["start"] = {"run": data.pop(SHORT)}
    tree.places[("start",)] = tree.places[("start", "run")] = tree.place((SHORT,))


def wanted(tree: Tree) -> str | None:
    """The run to inherit from; None where there is none, or where the recipe says all by itself (a resolved one)."""
    start = tree.data.get("start")
    if not isinstance(start, dict) or not isinstance(start.get("run"), str):
        return None
    model = tree.data.get("model")
    explicit = isinstance(model, dict) and "source" in model and "adapter" in tree.data and "adapter" in start
    return None if explicit else start["run"]


def inherit(tree: Tree, old: Recipe, folder: str) -> None:
    """Fill in what a recipe with a start leaves out.

    Args:
        tree: of the recipe, changed in place.
        old: the recipe of the run that it starts from.
        folder: that run's directory, as the recipe shall name it.
    """
    data, place = tree.data, tree.place(("start",))
    start: dict[str, Any] = {**data["start"], "run": folder}
    data["start"] = start
    for field in ("model", "adapter"):
        tree.places.setdefault((field,), place)
    kind = data.get("adapter", {}).get("kind", "lora") if isinstance(data.get("adapter", {}), dict) else "lora"
    if "adapter" not in data:
        data["adapter"], kind = old.adapter.model_dump(mode="json"), old.adapter.kind
    given = data.get("model") or {}
    if isinstance(given, dict) and "source" not in given:
        own = old.model.model_dump(mode="json")
        if old.adapter.kind == "full":
            # The folder holds the tokenizer with the template that the run used.
            own |= dict.fromkeys(("sha256", "revision", "tokenizer", "seed", "chat_template"))
            own |= {"source": base_folder(folder)}
            own |= {"dtype": "float32"} if kind == "full" else {}
        data["model"] = own | given
    if start.get("adapter") is None:
        algorithm = (data.get("federation") or {}).get("algorithm") or {}
        start["adapter"] = usual_way(old.adapter, data["adapter"], algorithm.get("name", "fedavg"))


def base_folder(run: str) -> str:
    """Where a run with full weights has its final model."""
    return f"{run.rstrip('/')}/adapter"


def usual_way(old: AdapterSpec, new: AdapterSpec | dict[str, Any], algorithm: str) -> Way:
    """'continue' where the adapters are alike and the algorithm can, else 'stack'."""
    try:
        spec = AdapterSpec.model_validate(new) if isinstance(new, dict) else new
    except ValidationError:  # told when the recipe is validated
        return "continue"
    if old.kind == "full":
        return "continue" if spec.kind == "full" else "stack"
    able = algorithm not in ALGORITHMS or not ALGORITHMS[algorithm].no_continue
    return "stack" if spec.kind == "lora" and not (able and unlike(old, spec) is None) else "continue"


def unlike(old: AdapterSpec, new: AdapterSpec) -> str | None:
    """The first setting by which the values of one adapter mean something else in the other; None where they fit."""
    for field in (name for name in AdapterSpec.model_fields if name != "dropout"):
        before, now = (sorted(v) if isinstance(v := getattr(spec, field), list) else v for spec in (old, new))
        if before != now:
            return f"adapter.{field} is {now} here and {before} there"
    return None


def refusal(old: Recipe, new: Recipe, way: Way) -> str | None:
    """Why a recipe cannot start from a run of another in this way; None where it can."""
    before, now = old.adapter, new.adapter
    if before.kind == "full":
        return None
    if now.kind == "full":
        return (
            f"that run trained a '{before.kind}' adapter, and this one trains full weights: "
            "`fedlm export RUN --merged --out FOLDER` makes them one model, which `model.source` can name"
        )
    if way == "continue":
        if now.kind == "lora-sb":
            return "LoRA-SB begins each run with A and B of its own: stack a 'lora' adapter on it"
        why = unlike(before, now)
        return why and f"the adapter cannot be continued: {why}"
    if now.kind != "lora" or before.kind not in ("lora", "lora-sb"):
        return f"a '{now.kind}' adapter cannot lie on a '{before.kind}' one: only LoRA on LoRA can be stacked"
    return None
