"""A run that starts from another: the old run's final model as tensors, pinned by their hash.

What a run starts from is constant. It is read once, before anything is computed, and kept in the new run's directory
(`start.safetensors`), so that the old run may go. Two parts:

    values   the adapter's first values: the old adapter's, where it is continued; where a fresh one is stacked on it,
             factors drawn anew, since the same seed would give those that the old run began with;
    frozen   fp32 deltas of the piece 'start' (`fedlm.models.deltas`): the old adapter, where a fresh one is stacked on
             it, and in either case what the old run had merged beside its adapter.

Neither is a part of the averaged model. Where silos need them they travel with each request under names that begin with
`START`; with `federation.downlink.send: changed` they travel once. Frozen deltas always travel, and of the values those
that the message lacks (a method may exchange a part of the adapter), or all of them where silos need the model that the
run began with: to compare with it, or to choose or write rows by it. So a silo never reads the coordinator's disk.
After a run with full weights the start is a base model, a folder that each party has to have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedlm.errors import ModelError, RunError
from fedlm.federation.disk import disk_errors
from fedlm.federation.rundir import RunDir
from fedlm.federation.versions import content_hash, digest
from fedlm.files import read_tensors, write_tensors
from fedlm.messages import Fields, Tensors
from fedlm.models.deltas import is_delta, piece_name, pieces_of
from fedlm.models.heads import HEAD
from fedlm.randomness import key
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import AdapterSpec, Recipe
from fedlm.recipe.start import base_folder, check_finished, refusal, usual_way
from fedlm.recipe.tasks import TASKS

START = "start/"
"""Of a tensor's name in a request: it is of the run's start and not of the global model."""

PIECE = "start"
"""Name of the frozen deltas' piece."""

FILE = "start.safetensors"


@dataclass(frozen=True)
class Start:
    """What a run starts from; empty for a bare base."""

    tensors: Tensors = field(default_factory=dict)
    facts: Fields = field(default_factory=dict)
    """What run.json says of it."""


def read_start(recipe: Recipe) -> Start:
    """The start that a recipe names, from its run's directory; an empty one where it names none.

    Raises:
        RecipeError: there is no such run, or it is not finished.
        RunError: it is another base model, another vocabulary, or another adapter than this recipe's; says which.
        ModelError: the adapter is damaged, or the base cannot be loaded.
    """
    if recipe.start is None:
        return Start()
    from fedlm.models.export import load_adapter
    from fedlm.recipe.load import load_recipe

    folder = Path(recipe.start.run)
    check_finished(folder)
    meta, old = RunDir.open(folder, write=False).meta, load_recipe(folder / "recipe.yaml")
    way = recipe.start.adapter or usual_way(old.adapter, recipe.adapter, recipe.federation.algorithm.name)
    if (why := refusal(old, recipe, way)) is not None:
        raise RunError(why, where=f"start: {folder}")
    tensors: Tensors = {}
    if old.adapter.kind == "full":
        _check_folder(folder, old, recipe)
        from fedlm.models.fingerprint import weights_hash

        sha256 = weights_hash(folder / "adapter")
    else:
        _check_base(meta.get("model"), old, recipe, folder)
        kind = "lora" if old.adapter.kind == "lora-sb" else old.adapter.kind
        adapter = old.adapter.model_copy(update={"kind": kind})
        kept = load_adapter(folder / "adapter", adapter)
        if TASKS[old.task].head != TASKS[recipe.task].head:  # a head means something to its own task alone
            kept.pop(HEAD, None)
        tensors = stacked(kept, adapter) if way == "stack" else continued(kept)
        depth = len((meta.get("start") or {}).get("lineage", []))
        tensors |= _fitting(tensors, recipe, folder, depth)
        sha256 = tensors_hash(tensors)
    facts: Fields = {
        "run": meta["run"],
        "path": str(folder),
        "task": old.task,
        "adapter": way,
        "sha256": sha256,
        "lineage": [*(meta.get("start") or {}).get("lineage", []), meta["run"]],
    }
    return Start(tensors, facts)


def tensors_hash(tensors: Tensors) -> str:
    """Hex SHA-256 over names, types, shapes and bytes."""
    return digest({name: content_hash(tensor) for name, tensor in tensors.items()})


def continued(kept: Tensors) -> Tensors:
    """A saved adapter as the first values of the next, with what was merged beside it frozen."""
    frozen = {layer: next(iter(pieces.values())) for layer, pieces in pieces_of(kept).items()}
    return {name: t for name, t in kept.items() if not is_delta(name)} | _pieces(frozen)


def stacked(kept: Tensors, adapter: AdapterSpec) -> Tensors:
    """A saved LoRA adapter and what was merged beside it, s B A + B' A', as frozen factors [s B, B'] and [A; A']."""
    scale, beside = adapter.scale(adapter.rank), pieces_of(kept)
    frozen: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, a in kept.items():
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removesuffix(".lora_A.weight")
        more = [p for p in beside.get(layer, {}).values() if len(p) == 2]
        b = torch.cat([kept[f"{layer}.lora_B.weight"].float() * scale, *(p[0].float() for p in more)], dim=1)
        frozen[layer] = (b, torch.cat([a.float(), *(p[1].float() for p in more)]))
    return _pieces(frozen)


def _pieces(frozen: dict[str, tuple[torch.Tensor, ...]]) -> Tensors:
    return {
        piece_name(layer, part, PIECE): tensor.contiguous()
        for layer, factors in sorted(frozen.items())
        for part, tensor in zip("BA", factors, strict=True)
    }


def keep_start(directory: RunDir, start: Start) -> None:
    """Write the start's tensors into the run's directory."""
    if start.tensors:
        with disk_errors(directory.path):
            write_tensors(directory.path / FILE, start.tensors)


def held_start(directory: RunDir, recipe: Recipe) -> Tensors:
    """The tensors that a run starts from, from its own directory; those of a bare base are none.

    Raises:
        RunError: they are damaged; or lost, and the old run is no longer what it was.
    """
    if recipe.start is None:
        return {}
    facts = directory.meta.get("start")
    if not isinstance(facts, dict):
        raise RunError("run.json does not say what the run starts from", where=str(directory.path))
    file = directory.path / FILE
    if file.exists():
        try:
            tensors = read_tensors(file)
        except Exception as error:  # what safetensors raises on a damaged file
            raise RunError(f"the run's start is damaged ({type(error).__name__})", where=str(file)) from error
        if tensors_hash(tensors) != facts["sha256"]:
            raise RunError(
                "the run's start is not the one it began with (its SHA-256 differs from the one in run.json)",
                where=str(file),
                fix="restore the file, or start a new run",
            )
        return tensors
    # Killed before it was written; or the start is a base model.
    start = read_start(recipe)
    _same(start, facts, directory)
    keep_start(directory, start)
    return start.tensors


def same_start(directory: RunDir, recipe: Recipe) -> None:
    """Before a run goes on: whether the old run, if it is still there, is what this one began from.

    Raises:
        RunError: its final model is another one now.
    """
    facts = directory.meta.get("start")
    if recipe.start is not None and isinstance(facts, dict) and (Path(recipe.start.run) / "run.json").exists():
        _same(read_start(recipe), facts, directory)


def _same(start: Start, facts: Fields, directory: RunDir) -> None:
    if start.facts["sha256"] != facts["sha256"]:
        raise RunError(
            f"the run that this one starts from has another final model now: SHA-256 {start.facts['sha256'][:12]}, "
            f"and {facts['sha256'][:12]} when this one began",
            where=str(directory.path),
            fix=f"put {facts['path']} back, or start a new run",
        )


# ---------------------------------------------------------------- on the way


def with_start(message: Tensors, start: Tensors, recipe: Recipe) -> Tensors:
    """A message to silos and what they need of the start beside it."""
    if not start:
        return message
    every = looks_back(recipe)
    return message | {START + n: t for n, t in start.items() if every or is_delta(n) or n not in message}


def looks_back(recipe: Recipe) -> bool:
    """Whether silos need the model that the run began with: a loss may compare with it, it may describe,
    choose or write rows."""
    facts = TASKS[recipe.task]
    data = recipe.data
    by_it = any(part is not None for part in (data.selection, data.instructions, data.augment))
    return by_it or (not facts.likelihood and facts.head == "none")


def whole_model(tensors: Tensors, start: Tensors) -> Tensors:
    """A message that asks for a whole model to be measured as it is, with the start beside it to be compared with."""
    return tensors | {START + name: tensor.clone() for name, tensor in start.items()}  # files hold no tensor twice


def begun(recipe: Recipe, start: Tensors) -> Tensors:
    """The model that a run starts from, whole."""
    from fedlm.models.adapters import base_tensors, initial_tensors

    return {**initial_tensors(recipe), **start} if start else base_tensors(recipe)


def parted(message: Tensors) -> tuple[Tensors, Tensors]:
    """A message's own tensors, and those of the start."""
    own = {name: tensor for name, tensor in message.items() if not name.startswith(START)}
    if len(own) == len(message):
        return message, {}
    return own, {n.removeprefix(START): t for n, t in message.items() if n.startswith(START)}


# ---------------------------------------------------------------- what does not fit


def _check_folder(folder: Path, old: Recipe, recipe: Recipe) -> None:
    if TASKS[old.task].head != "none":
        raise RunError(
            f"that run trained full weights for the task '{old.task}', so its model writes no text",
            where=f"start: {folder}",
            fix="start from a run whose task has no head, or from one that trained an adapter",
        )
    base = Path(base_folder(str(folder)))
    if Path(recipe.model.source).resolve() != base.resolve():
        raise RunError(
            f"that run trained full weights, so its model is the base, and `model.source` names another: "
            f"{recipe.model.source}",
            where=f"start: {folder}",
            fix=f"leave `model.source` out, or set it to {base}",
        )


def _check_base(pinned: Fields | None, old: Recipe, recipe: Recipe, folder: Path) -> None:
    """An adapter means something on its own base alone: the same weights, and the same vocabulary."""
    from fedlm.models.fingerprint import base_identity

    ours = base_identity(recipe.model.model_copy(update={"dtype": old.model.dtype}))
    theirs = pinned or base_identity(old.model)
    for part, what in (("weights", "base model"), ("vocabulary", "vocabulary")):
        if theirs[part] != ours[part]:
            raise RunError(
                f"the {what} is another one: that run's adapter lies on {old.model.source} "
                f"({part} {theirs[part][:12]}), this recipe's model is {recipe.model.source} ({ours[part][:12]})",
                where=f"start: {folder}",
                fix="leave `model.source` out",
            )


def _fitting(tensors: Tensors, recipe: Recipe, folder: Path, depth: int) -> Tensors:
    """The first values of a fresh adapter; none where these tensors have values, or where a method finds its own.

    Args:
        depth: how many runs the old one builds on.

    Raises:
        RunError: the tensors do not fit the recipe's adapter.
    """
    from fedlm.models.adapters import check_tensors, first_value, initial_tensors, lora_layers, skeleton

    if lost := sorted(pieces.keys() - lora_layers(skeleton(recipe)).keys() if (pieces := pieces_of(tensors)) else ()):
        raise RunError(
            f"that run's adapter changes {lost[0]}, which is no layer of this recipe's adapter",
            where=f"start: {folder}",
            fix="let `adapter.targets` name at least that run's modules, or begin from `fedlm export RUN --merged`",
        )
    shapes = {name: tensor.shape for name, tensor in initial_tensors(recipe).items()}
    values = {name: tensor for name, tensor in tensors.items() if not is_delta(name)}
    if not values:
        own = ALGORITHMS[recipe.federation.algorithm.name].principal
        seed = key(recipe.seed, "stacked", depth)
        return {} if own else {name: first_value(name, shape, seed) for name, shape in shapes.items()}
    added = {HEAD: first_value(HEAD, shapes[HEAD], recipe.seed)} if HEAD in shapes.keys() - values.keys() else {}
    try:
        check_tensors(shapes, values | added)
    except ModelError as error:
        raise RunError(f"the adapter cannot be continued: {error.what}", where=f"start: {folder}") from None
    return added
