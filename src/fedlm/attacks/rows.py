"""The rows that attacks are judged by: those that silos trained on, and others of the same source, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fedlm.federation.silo.encoded import task_rows
from fedlm.randomness import numpy_generator
from fedlm.recipe.data_checks import all_sources
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.privacy import noised_in_training
from fedlm.recipe.schema import Recipe
from fedlm.training.batches import batches
from fedlm.training.encode import encode_all
from fedlm.training.objective import sequences_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fedlm.federation.silo.workbench import Workbench
    from fedlm.training.sequences import Encoded

T = TypeVar("T")

OTHER_SOURCE = "held-out rows are of sources of their own, so part of the success may be to tell the sources apart"


def held_out(bench: Workbench, silos: Iterable[str], most: int, seed: int) -> list[Encoded]:
    """At most so many sequences of the silos' validation and test rows, chosen by the seed."""
    recipe = bench.recipe
    places = [
        (silo, role, i)
        for silo in silos
        for role in ("validation", "test")
        for i in range(len(getattr(bench.silo_data(silo), role)))
    ]
    chosen: dict[tuple[str, str], list[int]] = {}
    for i in sorted(numpy_generator(seed, "held-out rows").permutation(len(places))[:most].tolist()):
        silo, role, row = places[i]
        chosen.setdefault((silo, role), []).append(row)
    found: list[Encoded] = []
    for (silo, role), indices in chosen.items():
        rows, _ = task_rows(bench, silo, role)
        part = rows.select([i for i in indices if i < len(rows)])
        tokens = encode_all(
            part,
            bench.task,
            bench.tokenizer,
            recipe.training.max_length,
            skip=recipe.data.malformed == "skip",
            silo=silo,
        )
        found += sequences_of(list(tokens))
    return some(found, most, seed, "others")


def trained_on(
    bench: Workbench, rounds: Mapping[str, Sequence[int]], most: int, seed: int
) -> tuple[list[Encoded], int]:
    """At most so many of the sequences that silos trained on in these rounds, chosen by the seed, and how many there
    are; all of a silo's count where the recipe does not tell which it took."""
    places: list[tuple[str, int]] = []
    known = draws_are_known(bench.recipe)
    for silo, numbers in sorted(rounds.items()):
        tokens = bench.training_tokens(silo)
        chosen: Iterable[int] = range(len(tokens))
        if known:
            spec, key = bench.recipe.training, (bench.recipe.seed, silo)
            steps = [step for number in numbers for step in batches(spec, tokens.lengths, key, number)]
            chosen = np.unique(np.concatenate(steps)).tolist() if steps else ()
        places += [(silo, i) for i in chosen]
    found = [bench.training_tokens(silo)[i] for silo, i in some(places, most, seed, "members")]
    return sequences_of(found), len(places)


def draws_are_known(recipe: Recipe) -> bool:
    """Whether the recipe's seed says which rows a silo took in a round: not where the draw is the silo's secret, where
    others than its own order of rows count, or where it may have stopped early."""
    method = ALGORITHMS[recipe.federation.algorithm.name]
    others = recipe.data.selection is not None or recipe.data.augment is not None
    plain = not (method.personal or method.asynchronous or method.zeroth_order or method.losses)
    return (
        plain
        and not noised_in_training(recipe)
        and not others
        and not any(c.given for c in recipe.federation.capacity.all)
    )


def other_sources(recipe: Recipe) -> bool:
    """Whether held-out rows come from other sources than training rows."""
    return any(source.role in ("validation", "test") for _, source in all_sources(recipe.data))


def some(things: list[T], most: int, seed: int, purpose: str) -> list[T]:
    """At most so many of them, chosen by the seed, in their order."""
    if len(things) <= most:
        return things
    chosen = numpy_generator(seed, "rows attacked", purpose).permutation(len(things))[:most]
    return [things[i] for i in sorted(chosen.tolist())]
