"""Guards in a recipe: what happens to an update on its way up, and to the model on its way down."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from fedlm.errors import nearest
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.strict import Strict

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Facts:
    """What a recipe must know of a guard."""

    does: str
    paper: str
    stage: int
    """Guards of a chain come in this order, at most one of each: 0 needs matrices, 1 drops values, 2 ends the chain."""
    options: tuple[str, ...] = ()
    same_bits: bool = True
    """Decoding gives the same bits on every machine: it takes no sum of products."""


GUARDS: dict[str, Facts] = {
    "bf16": Facts("16 bits a value, fp32's range", "-", 2),
    "fp16": Facts("16 bits a value, scaled by the update's peak", "-", 2),
    "int8": Facts("8 bits a value, blockwise stochastic rounding", "Alistarh et al., NeurIPS 2017", 2, ("block",)),
    "int4": Facts("4 bits a value, blockwise stochastic rounding", "Alistarh et al., NeurIPS 2017", 2, ("block",)),
    "topk": Facts("the largest values and their places", "Stich et al., NeurIPS 2018", 1, ("density", "k")),
    "randk": Facts("values at places drawn from a shared seed", "Konečný et al., 2016", 1, ("density", "k")),
    "lowrank": Facts(
        "each matrix as a product of thin ones", "Halko, Martinsson and Tropp, 2011", 0, ("rank",), same_bits=False
    ),
    "mask": Facts(
        "hidden from everyone, the coordinator too, in the sum over all silos (secure aggregation)",
        "Bonawitz et al., CCS 2017; Bell et al., CCS 2020",
        2,
        ("bits", "bound", "max_weight", "dropouts", "corrupt", "coordinator"),
        same_bits=False,
    ),
}

MASK = "mask"


class GuardSpec(Strict):
    """One guard of a chain."""

    name: str
    block: Annotated[int, Field(ge=64, le=65536)] = Field(
        64, description="int8, int4: values that share an fp16 scale. 64 costs 0.25 bits a value."
    )
    density: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.01, description="topk, randk: share of the update's values that travels."
    )
    k: PositiveInt | None = Field(None, description="topk, randk: number of values, in place of `density`.")
    rank: PositiveInt = Field(4, description="lowrank: of each matrix's sketch.")
    bits: Annotated[int, Field(ge=8, le=24)] = Field(16, description="mask: of a value, rounded at random.")
    bound: PositiveFloat | None = Field(
        None,
        description="mask: the largest magnitude of a value; larger ones are cut. Default: twice what AdamW moves in a "
        "round of `training.steps` at the full rate, 2 x lr x steps.",
    )
    max_weight: PositiveInt = Field(
        1024, description="mask: what a silo counts for at most, in examples, or in rows of max_length tokens."
    )
    dropouts: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="mask: share of a round's silos that may drop out."
    )
    corrupt: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.1, description="mask: share of a round's silos that may work together with the coordinator."
    )
    coordinator: Literal["honest", "malicious"] = Field(
        "honest",
        description="mask: 'honest' keeps to the protocol; with 'malicious' silos sign who is in the sum before any of "
        "them helps to unmask it.",
    )
    error_feedback: bool = Field(
        False,
        description="What this guard and those after it lose stays in the silo and is added to its next update. Only "
        "for the first guard.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in GUARDS:
            raise ValueError(f"unknown guard '{name}', {nearest(name, GUARDS)}")
        return name


class DownlinkSpec(Strict):
    """What a silo receives of the global model."""

    send: Literal["full", "changed"] = Field(
        "full", description="'changed': silos keep what they received last, and get only the tensors that differ."
    )
    guards: list[GuardSpec] = Field(
        default_factory=list,
        description="For `send: changed`: the difference to the model before goes through this chain, and silos and "
        "coordinator all work on what is decoded. What is lost stays at the coordinator for the next round.",
    )


def guard_problems(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Chains that cannot work, or that the algorithm cannot have."""
    name, method = recipe.federation.algorithm.name, ALGORITHMS[recipe.federation.algorithm.name]
    down, here = recipe.federation.downlink, ("federation", "downlink")
    yield from _chain(recipe.guards, ("guards",))
    yield from _chain(down.guards, (*here, "guards"))
    if recipe.guards and method.no_guards:
        yield ("guards",), f"not with '{name}': {method.no_guards}"
    for i, spec in enumerate(recipe.guards):
        if i and spec.error_feedback:
            yield (
                ("guards", i, "error_feedback"),
                "belongs to the chain's first guard: it gives back what all of them lose together, and after "
                f"'{recipe.guards[0].name}' a value's place is another one every round",
            )
        if method.setup_rounds and GUARDS[spec.name].stage < 2:
            yield (
                ("guards", i, "name"),
                f"'{spec.name}' not with '{name}': its first round sends sketches, of which no part can be left out",
            )
    yield from _masks(recipe)
    feedback = bool(recipe.guards) and recipe.guards[0].error_feedback
    if feedback and method.no_feedback:
        yield ("guards", 0, "error_feedback"), f"not with '{name}': {method.no_feedback}"
    if recipe.guards and not feedback and method.needs_feedback:
        yield ("guards", 0, "error_feedback"), f"must be true with '{name}': {method.needs_feedback}"
    if down.send == "full":
        if down.guards:
            yield (*here, "guards"), "have no effect with `send: full`: silos that keep nothing need all of the model"
        return
    if method.asynchronous:
        yield (*here, "send"), f"not with '{name}': its silos are at work on models of different rounds"
    if down.guards and not method.plain_broadcast:
        yield (
            (*here, "guards"),
            f"not with '{name}': what it sends down is more than averaged values, and is not rounded",
        )
    for i, spec in enumerate(down.guards):
        if spec.error_feedback:
            yield (*here, "guards", i, "error_feedback"), "has no effect: the way down always gives back what it lost"
        if not GUARDS[spec.name].same_bits:
            yield (
                (*here, "guards", i, "name"),
                f"'{spec.name}' decodes to other bits on other processors, where silos and coordinator must agree",
            )


def mask_of(recipe: Recipe) -> GuardSpec | None:
    """The mask, which is the last guard, or None."""
    return next((spec for spec in recipe.guards if spec.name == MASK), None)


def mask_bound(recipe: Recipe) -> float | None:
    """The largest magnitude under the mask; None where it does not follow from the recipe."""
    spec, training = mask_of(recipe), recipe.training
    if spec is None or spec.bound is not None:
        return None if spec is None else spec.bound
    moves = training.optimizer == "adamw" and training.steps is not None
    return 2 * training.lr * training.steps if moves and training.steps is not None else None


def _masks(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """What cannot be told from a sum over silos, and what would show a single one."""
    spec = mask_of(recipe)
    if spec is None:
        return
    place = recipe.guards.index(spec)
    here: Path = ("guards", place)
    name, method = recipe.federation.algorithm.name, ALGORITHMS[recipe.federation.algorithm.name]
    if reason := method.no_masks:
        yield (*here, "name"), f"not with '{name}': {reason}"
    if spec.error_feedback:
        yield (*here, "error_feedback"), "not under a mask: what rounding to its bits loses is right on average already"
    for before in recipe.guards[:place]:
        if before.name != "randk":
            yield (*here, "name"), f"not after '{before.name}', which every silo does otherwise: only after 'randk'"
    protected = recipe.privacy is not None and recipe.privacy.unit == "silo"  # the clip is the bound
    if mask_bound(recipe) is None and not protected:
        yield (*here, "bound"), "give it: without AdamW and `training.steps` nothing says how far a value moves"
    for field in ("rank", "layers", "targets", "memory"):
        if any(field in capacity.given for capacity in recipe.federation.capacity.all):
            yield ("federation", "capacity"), f"`{field}` not under masks: a sum needs the same tensors from every silo"
    if recipe.federation.oversample > 0:
        yield ("federation", "oversample"), "not under masks: who is in the sum is settled before the training"
    if recipe.federation.sample != "all" and isinstance(recipe.federation.sample, int) and recipe.federation.sample < 3:
        yield ("federation", "sample"), "a sum over fewer than 3 silos hides none of them"
    if recipe.evaluation.silos is not None and recipe.evaluation.silos < 3:
        yield ("evaluation", "silos"), "figures are summed under masks, and a sum over fewer than 3 silos hides none"


def _chain(specs: Sequence[GuardSpec], path: Path) -> Iterator[tuple[Path, str]]:
    """Each guard's options, and their order."""
    for i, spec in enumerate(specs):
        facts = GUARDS[spec.name]
        for field in (f for f in GuardSpec.model_fields if f not in ("name", "error_feedback")):
            if field not in facts.options and getattr(spec, field) != GuardSpec.model_fields[field].default:
                owners = ", ".join(sorted(n for n, other in GUARDS.items() if field in other.options))
                yield (*path, i, field), f"has no effect with '{spec.name}' (it belongs to {owners})"
        if spec.k is not None and spec.density != GuardSpec.model_fields["density"].default:
            yield (*path, i, "k"), "give either `k` or `density`"
        before = GUARDS[specs[i - 1].name].stage if i else -1
        if before == 2:
            yield (*path, i, "name"), f"'{specs[i - 1].name}' leaves nothing to the guards after it: put it last"
        elif before >= facts.stage:
            yield (*path, i, "name"), f"'{spec.name}' cannot work on what '{specs[i - 1].name}' leaves: put it before"
