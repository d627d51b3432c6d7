"""The rows of a silo that a selection leaves: judged once, by the model that the run begins with.

What was found is kept in the cache, under a hash of everything it follows from (the model, its first adapter, the
encoded rows, the settings): every process of a simulation, and every repeated or resumed run, finds the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedlm.errors import DataError
from fedlm.federation.disk import disk_errors
from fedlm.federation.silo.reference import reference_hash, sequences_hash
from fedlm.files import cache_dir, read_tensors, write_tensors
from fedlm.recipe.selection import SelectionSpec
from fedlm.training.encode import TokenSet

if TYPE_CHECKING:
    from fedlm.algorithms.base import Place
    from fedlm.federation.silo.workbench import Workbench

CODE = 1
"""Of what is computed and how: part of each hash."""

SCORE = "score"
"""The fact of an example that says how well it fits its instruction."""


def scored(bench: Workbench, tokens: TokenSet, spec: SelectionSpec) -> TokenSet:
    """The examples with the best scores, each with its score as a fact.

    Raises:
        DataError: none reaches the threshold.
    """
    from fedlm.training.selection.alignment import alignment, best

    def compute(model: Any) -> torch.Tensor:
        recipe = bench.recipe
        found = alignment(
            model,
            bench.tokenizer,
            tokens,
            batch_tokens=recipe.evaluation.batch_tokens,
            packing=recipe.training.packing,
        )
        return torch.from_numpy(found)

    scores = _remembered(bench, tokens, ["alignment", bench.recipe.training.packing], compute)
    if not np.isfinite(scores).all():
        raise DataError("the model gives a training row a likelihood that is not finite, so rows cannot be judged")
    kept = best(scores, spec.keep, spec.threshold)
    facts = {**tokens.facts, SCORE: scores.astype(np.float32)}
    return replace(tokens, facts=facts).subset(kept)


def described(bench: Workbench, silo: str, spec: SelectionSpec) -> tuple[TokenSet, np.ndarray, list[np.ndarray]]:
    """A silo's examples, their descriptions [n, dimensions], and the groups of like ones."""
    from fedlm.training.selection.representatives import groups_of

    tokens = bench.training_tokens(silo)
    points = descriptions(bench, tokens, spec.dimensions)
    return tokens, points, groups_of(points, spec.min_group)


def descriptions(bench: Workbench, tokens: TokenSet, dimensions: int) -> np.ndarray:
    """Numbers that describe each example [n, dimensions], by the model that the run begins with.

    Raises:
        DataError: they are not finite.
    """
    from fedlm.training.selection.representatives import features

    recipe = bench.recipe

    def compute(model: Any) -> torch.Tensor:
        batch = recipe.evaluation.batch_tokens
        return torch.from_numpy(features(model, tokens, dimensions, seed=recipe.seed, batch_tokens=batch))

    points = _remembered(bench, tokens, ["features", dimensions, recipe.seed], compute)
    if not np.isfinite(points).all():
        raise DataError("the model's states of a row are not finite, so rows cannot be compared")
    return points


def centroids(bench: Workbench, silo: str) -> torch.Tensor:
    """What leaves the silo to choose among groups of rows: their centroids [groups, dimensions], fp32."""
    from fedlm.training.selection.representatives import centroids_of

    spec = bench.recipe.data.selection
    if spec is None or spec.method != "fedhds":
        raise DataError("the recipe selects no rows by groups, so there are no centroids", where="data.selection")
    _, points, groups = described(bench, silo, spec)
    return torch.from_numpy(centroids_of(points, groups)).float()


def round_tokens(bench: Workbench, place: Place, chosen: Iterable[int] | None) -> TokenSet:
    """The examples of this round.

    Args:
        chosen: with 'fedhds' the silo's groups that stand for all silos' rows; all of its own where nobody chose (the
            silo came when the run was under way). With public rows the silo's centres that these shall lie near.

    Raises:
        DataError: a chosen group does not exist.
    """
    if bench.recipe.data.augment is not None:
        from fedlm.federation.silo.augmented import with_public

        return with_public(bench, place.silo, chosen)
    spec = bench.recipe.data.selection
    if spec is None:
        return bench.training_tokens(place.silo)
    if spec.method == "feddqc":
        return _of_stage(bench.training_tokens(place.silo), spec, place)
    from fedlm.training.selection.representatives import nearest_rows

    tokens, points, groups = described(bench, place.silo, spec)
    numbers = list(range(len(groups))) if chosen is None else [int(g) for g in chosen]
    if not numbers or not set(numbers) <= set(range(len(groups))):
        raise DataError("the groups of rows that were chosen are not this silo's", where="data.selection")
    return tokens.subset(nearest_rows(points, groups, numbers))


def _of_stage(tokens: TokenSet, spec: SelectionSpec, place: Place) -> TokenSet:
    from fedlm.training.selection.alignment import stage

    if spec.stages == 1:
        return tokens
    scores = np.asarray(tokens.facts[SCORE], np.float64)
    part = tokens.subset(stage(scores, spec.stages, place.round, place.rounds))
    return replace(part, left_out=tokens.left_out)  # other stages' rows are not left out


def _remembered(
    bench: Workbench, tokens: TokenSet, what: list[Any], compute: Callable[[Any], torch.Tensor]
) -> np.ndarray:
    """What `compute` finds with the model that the run begins with, fp64, from the cache where it was found before."""
    folder = cache_dir() / "selection"
    rows = sequences_hash([sequence for example in tokens for sequence in example.sequences])
    settings = [CODE, *what, reference_hash(bench), rows, bench.recipe.evaluation.batch_tokens]
    file = folder / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:40]}.safetensors"
    if file.is_file():
        return read_tensors(file)["found"].numpy()
    with bench.as_reference():
        found = compute(bench.model)
    with disk_errors(folder, "cache"):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_tensors(file, {"found": found})
    return found.numpy()
