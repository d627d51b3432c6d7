"""Preference alignment in a recipe: which loss, its constants, and how objectives are weighed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from fedlm.errors import RecipeError, nearest
from fedlm.recipe.data_checks import Problem, all_sources, changed, kind_of
from fedlm.recipe.strict import Strict

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe

TASK = "preference"


@dataclass(frozen=True)
class LossFacts:
    """What a recipe must know of a preference loss."""

    paper: str
    beta: float
    """Its default."""
    options: tuple[str, ...] = ()
    reference: bool = False
    """It compares with the policy at the start of the stage."""
    unpaired: bool = False
    """It learns from single answers with a verdict; a pair counts as two of them."""


LOSSES: dict[str, LossFacts] = {
    "dpo": LossFacts("Rafailov et al., NeurIPS 2023", 0.1, ("label_smoothing",), reference=True),
    "ipo": LossFacts("Azar et al., AISTATS 2024", 0.1, reference=True),
    "kto": LossFacts(
        "Ethayarajh et al., ICML 2024", 0.1, ("desirable_weight", "undesirable_weight"), reference=True, unpaired=True
    ),
    "orpo": LossFacts("Hong et al., EMNLP 2024", 0.1),
    "simpo": LossFacts("Meng et al., NeurIPS 2024", 2.0, ("gamma",)),
}


class PreferenceSpec(Strict):
    """For `task: preference`: which answers a model should prefer, and how strongly."""

    loss: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = "dpo"
    beta: PositiveFloat | None = Field(
        None,
        description="dpo, kto, simpo: scale of the reward; ipo: tau; orpo: lambda. Default 0.1; simpo 2.0.",
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="dpo: share of pairs that are taken to be the wrong way round."
    )
    gamma: Annotated[float, Field(ge=0.0)] = Field(
        0.5, description="simpo: by how much the chosen answer's reward should be the larger."
    )
    desirable_weight: PositiveFloat = Field(1.0, description="kto: of the answers that are wanted.")
    undesirable_weight: PositiveFloat = Field(1.0, description="kto: of those that are not.")
    weights: dict[str, PositiveFloat] = Field(
        default_factory=dict,
        description="Several objectives: the weight of each, by its label in `columns.label`. A silo minimises the "
        "weighted mean of its objectives' mean losses. Default: labels play no part.",
    )
    silo_weights: dict[str, dict[str, PositiveFloat]] = Field(
        default_factory=dict,
        description="By silo, weights that it trains with in place of `weights`; models are measured with `weights`.",
    )

    @property
    def facts(self) -> LossFacts:
        return LOSSES[self.loss]

    @property
    def strength(self) -> float:
        """Beta, or the loss's own default."""
        return self.facts.beta if self.beta is None else self.beta


def preference_problems(recipe: Recipe) -> Iterator[Problem]:
    """Settings of preference alignment that cannot be kept, or that nothing reads."""
    spec, here = recipe.preference, ("preference",)
    if recipe.task != TASK:
        if changed(recipe, "preference"):
            yield here, f"has no effect with task '{recipe.task}'"
        return
    for field in ("label_smoothing", "gamma", "desirable_weight", "undesirable_weight"):
        if field not in spec.facts.options and changed(spec, field):
            owners = ", ".join(name for name, loss in LOSSES.items() if field in loss.options)
            yield (*here, field), f"has no effect with '{spec.loss}' (it belongs to {owners})"
    if recipe.adapter.dropout > 0:
        yield (
            ("adapter", "dropout"),
            "preference losses compare probabilities of whole answers, which dropout would make random: set it to 0",
        )
    if spec.facts.reference and recipe.adapter.kind == "full":
        free = ", ".join(name for name, loss in LOSSES.items() if not loss.reference)
        yield (
            ("adapter", "kind"),
            f"'{spec.loss}' compares with the model as it was at the start, which full training overwrites: train an "
            f"adapter, or use a loss without a reference ({free})",
        )
    for path, source in all_sources(recipe.data):
        if kind_of(source.columns) == "judged" and not spec.facts.unpaired:
            able = ", ".join(name for name, loss in LOSSES.items() if loss.unpaired)
            yield (*path, "columns"), f"'{spec.loss}' needs pairs of answers; single ones are for {able}"
        if spec.weights and source.columns.label is None:
            yield (*path, "columns", "label"), "must name the column that holds a row's objective (preference.weights)"
    for capacity in recipe.federation.capacity.all:
        if capacity.memory is not None:
            yield (
                ("federation", "capacity"),
                "memory is planned for examples of one sequence: give rank, layers or `training.micro_batch_size`",
            )
            break
    for silo, weights in spec.silo_weights.items():
        if weights.keys() != spec.weights.keys():
            listed = ", ".join(sorted(spec.weights)) or "none"
            yield (
                (*here, "silo_weights", silo),
                f"must weigh the same objectives as `preference.weights` ({listed})",
            )


def check_silos(recipe: Recipe, silos: Sequence[str]) -> None:
    """Refuse weights of a silo that is not there.

    Raises:
        RecipeError: naming it.
    """
    for silo in recipe.preference.silo_weights:
        if silo not in silos:
            raise RecipeError(
                f"there is no silo '{silo}'", where=f"preference.silo_weights.{silo}", fix=nearest(silo, silos)
            )
