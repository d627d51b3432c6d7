"""A silo's own rows and the public rows beside them (see `fedlm.training.selection.coverage`).

Public rows are described and found in the silo, by the model that the run begins with: the coordinator has no model,
and which rows were found need not be told to anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedlm.errors import DataError
from fedlm.federation.silo.selected import descriptions
from fedlm.randomness import numpy_generator
from fedlm.recipe.augment import AugmentSpec
from fedlm.training.encode import TokenSet

if TYPE_CHECKING:
    from fedlm.federation.silo.workbench import Workbench

ROLES = ("train", "validation", "test")


def encoded_public(bench: Workbench) -> tuple[TokenSet, list[str]]:
    """The examples that the public rows give, and the content hash of each one's row.

    Raises:
        DataError: see `fedlm.training.encode.encoded_rows`.
    """
    from fedlm.training.encode import Tally, encoded_rows

    tally, owners, current = Tally(), [], ""

    def passing() -> Iterator[dict[str, Any]]:
        nonlocal current
        for row in bench.data.public:
            current = row["hash"]
            yield row

    examples = []
    limit, skip = bench.recipe.training.max_length, bench.recipe.data.malformed == "skip"
    for example in encoded_rows(passing(), bench.task, bench.tokenizer, limit, skip=skip, tally=tally):
        examples.append(example)
        owners.append(current)  # a row's examples come before the next row is taken
    return TokenSet.of(examples, tally.dropped, tally.cut), owners


def centres(bench: Workbench, silo: str) -> torch.Tensor:
    """What leaves the silo: the centres of groups of its rows [groups, dimensions], fp32, of unit length."""
    found, _ = _described(bench, silo, _spec(bench))
    return torch.from_numpy(found).float()


def with_public(bench: Workbench, silo: str, chosen: Iterable[int] | None) -> TokenSet:
    """The silo's examples, and after them the public ones nearest to its chosen centres.

    Args:
        chosen: numbers of centres; without any, the silo's own examples alone.

    Raises:
        DataError: a chosen centre does not exist, or too few public rows are none that the silo holds.
    """
    from fedlm.training.selection.coverage import nearest_public

    spec, tokens = _spec(bench), bench.training_tokens(silo)
    numbers = [int(number) for number in chosen or ()]
    if not numbers:
        return tokens
    own, described = _described(bench, silo, spec)
    if not set(numbers) <= set(range(len(own))):
        raise DataError("the centres that were chosen are not this silo's", where="data.augment")
    examples, owners = bench.public
    held = _held(bench, silo)
    free = np.array([i for i, content in enumerate(owners) if content not in held], np.int64)
    if len(free) < spec.rows:
        raise DataError(
            f"only {len(free)} of the public rows are none that a silo holds, and it is to take {spec.rows}",
            where="data.augment.rows",
            fix="lower it, or name more sources",
        )
    found = examples.subset(free[nearest_public(described[free], own[numbers], spec.rows)])
    return replace(TokenSet.of([*tokens, *found], tokens.dropped, tokens.cut), left_out=tokens.left_out)


def _described(bench: Workbench, silo: str, spec: AugmentSpec) -> tuple[np.ndarray, np.ndarray]:
    """The silo's centres and the public examples, [n, dimensions] each, of unit length about the public mean."""
    from fedlm.training.selection.coverage import centres_of, units

    public = descriptions(bench, bench.public[0], spec.dimensions)
    middle = public.mean(axis=0)
    own = units(descriptions(bench, bench.training_tokens(silo), spec.dimensions), middle)
    generator = numpy_generator(bench.recipe.seed, "coverage", silo)
    return centres_of(own, spec.clusters, spec.min_group, generator), units(public, middle)


def _held(bench: Workbench, silo: str) -> set[str]:
    """Content hashes of all rows of the silo: what it trains on already, and above all what it measures on."""
    data = bench.silo_data(silo)
    return {content for role in ROLES for content in getattr(data, role)["hash"][:]}


def _spec(bench: Workbench) -> AugmentSpec:
    spec = bench.recipe.data.augment
    if spec is None:
        raise DataError("the recipe names no public rows, so there are no centres", where="data.augment")
    return spec
