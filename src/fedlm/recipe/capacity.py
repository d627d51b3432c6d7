"""What single silos can do, where they differ: a part of a recipe, and of a silo's own policy."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from fedlm.errors import RecipeError, nearest
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.data_checks import Path, Problem
    from fedlm.recipe.schema import Recipe

HERE: Path = ("federation", "capacity")

UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def read_bytes(text: str) -> int:
    """The bytes of a budget such as '800MB' or '1.5 GiB'.

    Raises:
        ValueError: it is no number with a unit, or nothing.

    >>> read_bytes("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(MB|GB|MiB|GiB)", text)
    size = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if size <= 0:
        raise ValueError(f"'{text[:40]}' is no amount of memory: write for instance '800MB', '1.5GB' or '2GiB'")
    return size


class Capacity(Strict):
    """What one silo can do; what is left out is not limited. A silo never does more than the recipe asks of all."""

    memory: str | None = Field(
        None,
        description="Memory of the process that trains, such as '1.5GB', 'MB' and 'GiB' too; what fits is planned "
        "(see `fedlm recipe memory`).",
    )
    rank: PositiveInt | None = Field(None, description="LoRA rank, at most the adapter's.")
    layers: PositiveInt | None = Field(
        None, description="Decoder layers that are trained, counted from the last; those below stay as received."
    )
    targets: list[str] | None = Field(
        None, min_length=1, description="Modules that are trained, out of the adapter's; the others stay as received."
    )
    steps: PositiveInt | None = Field(None, description="Most optimiser steps of a round.")
    seconds: PositiveFloat | None = Field(
        None,
        description="Time for a round's steps: a silo stops before the step that would end later (never before the "
        "first) and sends what it has. In a simulation a step takes what `federation.speeds` says, over a network "
        "what it takes.",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="Storage type of the frozen base weights here, in place of the recipe's."
    )
    quantise: Literal["4bit"] | None = Field(
        None, description="Frozen base weights in 4 bits (NF4); needs an NVIDIA GPU and the extra [gpu4bit]."
    )
    processes: Annotated[int, Field(ge=1, le=64)] | None = Field(
        None,
        description="Processes (on several GPUs, devices) that share each step of local training; each holds the "
        "model. The result is the same up to the order of sums.",
    )
    shards: Annotated[int, Field(ge=2, le=64)] | None = Field(
        None,
        description="In place of `processes`, for full weights: so many processes, each on a GPU of its own if any, "
        "and each with a part of weights, gradients and optimiser state (FSDP).",
    )

    @field_validator("memory")
    @classmethod
    def _amount(cls, text: str | None) -> str | None:
        if text is not None:
            read_bytes(text)
        return text

    @property
    def given(self) -> dict[str, Any]:
        """What is limited, as plain JSON."""
        return self.model_dump(mode="json", exclude_none=True)

    def with_(self, other: Capacity) -> Capacity:
        """This, with what `other` limits in place of its own."""
        return Capacity(**(self.given | other.given))


class CapacitySpec(Strict):
    """What silos can do where they differ: the default, over it what is dealt to a silo, over it what its name has."""

    default: Capacity = Capacity()
    dealt: list[Capacity] = Field(
        default_factory=list, description="Dealt in turn to the silos in the order of their names, over the default."
    )
    silos: dict[str, Capacity] = Field(default_factory=dict, description="By silo, over the default and what is dealt.")

    @property
    def all(self) -> list[Capacity]:
        """Every one that a silo may have."""
        return [self.default, *self.dealt, *self.silos.values()]

    def of(self, silo: str, position: int) -> Capacity:
        """What one silo can do.

        Args:
            position: of its name among all silos' names, sorted.
        """
        capacity = self.default
        if self.dealt:
            capacity = capacity.with_(self.dealt[position % len(self.dealt)])
        return capacity.with_(self.silos.get(silo, Capacity()))


def parse_capacity(fields: Any) -> Capacity:
    """A capacity as it came over the network, None for one without limits.

    Raises:
        RecipeError: it is none.
    """
    try:
        return Capacity.model_validate(fields or {})
    except ValueError:  # ValidationError, and half a surrogate pair that no sentence of pydantic's can hold
        raise RecipeError("what the coordinator says that this silo can do is no such description") from None


def lesser(a: Capacity, b: Capacity) -> Capacity:
    """What keeps within both; of types of base weights, `b`'s where it says one, and `b`'s processes or shards.

    Args:
        b: the owner's.

    Raises:
        RecipeError: they have no module to train in common.
    """

    def least(field: str) -> Any:
        values = [value for value in (getattr(a, field), getattr(b, field)) if value is not None]
        return min(values, default=None)

    amounts = [text for text in (a.memory, b.memory) if text is not None]
    targets = a.targets if b.targets is None else b.targets
    if a.targets is not None and b.targets is not None:
        targets = [name for name in a.targets if name in b.targets]
        if not targets:
            raise RecipeError("the run's and the silo's capacity have no module to train in common", where="targets")
    weights = b if b.dtype or b.quantise else a
    return Capacity(
        memory=min(amounts, key=read_bytes, default=None),
        rank=least("rank"),
        layers=least("layers"),
        targets=targets,
        steps=least("steps"),
        seconds=least("seconds"),
        dtype=weights.dtype,
        quantise=weights.quantise,
        processes=b.processes,
        shards=b.shards,
    )


def capacity_problems(recipe: Recipe) -> Iterator[Problem]:
    """What a recipe may not say of single silos."""
    spec = recipe.federation.capacity
    entries: list[tuple[Path, Capacity]] = [((*HERE, "default"), spec.default)]
    entries += [((*HERE, "dealt", i), capacity) for i, capacity in enumerate(spec.dealt)]
    entries += [((*HERE, "silos", name), capacity) for name, capacity in spec.silos.items()]
    for path, capacity in entries:
        for field, reason in _impossible(recipe, capacity):
            yield (*path, field), reason
    if recipe.model.quantise is not None and (problem := _unquantisable(recipe)):
        yield ("model", "quantise"), problem
    names = [silo.name for silo in recipe.data.silos]
    for name in spec.silos:
        if names and name not in names:
            yield (*HERE, "silos", name), f"there is no silo '{name}': {nearest(name, names)}"


def _impossible(recipe: Recipe, capacity: Capacity) -> Iterator[tuple[str, str]]:
    """Fields of one capacity that cannot be kept, or would have no effect, with the reason."""
    name, adapter, training = recipe.federation.algorithm.name, recipe.adapter, recipe.training
    method = ALGORITHMS[name]
    given = capacity.given
    for field in ("memory", "rank", "layers", "targets"):
        if field in given and adapter.kind != "lora":
            yield field, f"only LoRA adapters differ between silos, and this is '{adapter.kind}'"
            return
    if capacity.rank is not None and capacity.rank > adapter.rank:
        yield "rank", f"is above adapter.rank, {adapter.rank}, which is the largest of all silos"
    elif capacity.rank not in (None, adapter.rank) and not method.mixed_ranks:
        yield "rank", f"'{name}' needs equal ranks (methods that mix them: {_able('mixed_ranks')})"
    for field in ("layers", "targets"):
        if field in given and not method.partial:
            yield field, f"'{name}' needs the whole adapter from every silo (others: {_able('partial')})"
    if capacity.memory is not None and not (method.mixed_ranks or method.partial):
        yield (
            "memory",
            f"'{name}' needs the same from every silo, so nothing can be fitted to memory (ranks can be mixed with "
            f"{_able('mixed_ranks')}; a part can be trained with {_able('partial')})",
        )
    if capacity.memory is not None and recipe.model.device in ("cuda", "mps"):
        yield "memory", "is planned for training on a CPU; on a GPU give rank, layers or targets"
    elif capacity.memory is not None and (capacity.quantise or recipe.model.quantise):
        yield "memory", "is planned for training on a CPU, and 4-bit weights need a GPU: give rank, layers or targets"
    if strange := [t for t in capacity.targets or () if adapter.targets != "all-linear" and t not in adapter.targets]:
        yield "targets", f"'{strange[0]}' is none of adapter.targets: {nearest(strange[0], adapter.targets)}"
    for field in ("steps", "seconds"):
        if field in given and method.same_steps:
            yield field, f"with '{name}' all silos take the same steps"
        elif field == "seconds" and field in given and method.zeroth_order:
            yield field, f"'{name}' takes all its steps: give `steps`"
    if capacity.steps is not None and training.steps is not None and capacity.steps > training.steps:
        yield "steps", f"is above training.steps, {training.steps}, which is the most of all silos"
    if capacity.steps is not None and capacity.steps < method.min_steps:
        yield "steps", f"'{name}' needs at least {method.min_steps} steps a round"
    if capacity.seconds is not None and capacity.seconds >= (recipe.federation.deadline or math.inf):
        yield "seconds", "does not end before federation.deadline, and what comes after that is dropped"
    if capacity.quantise is not None and capacity.dtype is not None:
        yield "dtype", "has no effect on quantised weights"
    yield from sharing_problems(recipe, capacity)
    if capacity.dtype is not None and adapter.kind == "full":
        yield "dtype", "is of frozen weights, and all weights are trained"
    if capacity.quantise is not None and (problem := _unquantisable(recipe)):
        yield "quantise", problem


def sharing_problems(recipe: Recipe, capacity: Capacity) -> Iterator[tuple[str, str]]:
    """Why the steps of a silo's training cannot be shared by processes, as this capacity has it."""
    name, kind = recipe.federation.algorithm.name, recipe.adapter.kind
    given = [field for field in ("processes", "shards") if field in capacity.given]
    if not given:
        return
    field = given[-1]
    if len(given) > 1:
        yield field, "stands in place of processes: give one of the two"
    elif ALGORITHMS[name].zeroth_order:
        yield field, f"has no effect with '{name}', whose loop has no gradients to share"
    elif not TASKS[recipe.task].likelihood:
        yield field, f"only a likelihood of text is shared, and the loss of '{recipe.task}' is another"
    elif field == "processes" and kind not in ("lora", "ia3", "full"):
        yield field, f"not with adapter.kind '{kind}' (with lora, ia3, full)"
    elif field == "shards" and kind != "full":
        yield field, f"only full weights are sharded, and this is '{kind}', which is small: give `processes`"
    elif field == "shards" and ALGORITHMS[name].between_steps:
        yield field, f"'{name}' changes whole gradients or weights between steps: give `processes`"
    elif field == "shards" and recipe.training.compile:
        yield field, "not with training.compile"


def _unquantisable(recipe: Recipe) -> str | None:
    """Why the base cannot have 4-bit weights; None where it can."""
    if recipe.adapter.kind == "full":
        return "is of frozen weights, and all weights are trained"
    if recipe.model.device in ("cpu", "mps"):
        return f"4-bit weights need an NVIDIA GPU, and model.device is '{recipe.model.device}'"
    if ALGORITHMS[name := recipe.federation.algorithm.name].principal:
        return f"'{name}' starts from the singular vectors of the weights as they are"
    return None


def _able(fact: str) -> str:
    return ", ".join(sorted(name for name, method in ALGORITHMS.items() if getattr(method, fact))) or "none"
