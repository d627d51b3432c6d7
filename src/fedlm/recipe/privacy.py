"""Differential privacy in a recipe: whose data is protected, at which epsilon, and what cannot be combined with it.

With `unit: example` each silo adds the noise itself, inside its training (DP-SGD: Abadi et al., CCS 2016; DP-FTRL:
Kairouz et al., ICML 2021), so nobody else needs to be trusted; with `unit: user` likewise, for all rows of a person
that the silo holds (user-level sampling: Charles et al., "Fine-Tuning Large Language Models with User-Level
Differential Privacy", 2024). With `unit: silo` whole updates are clipped, and noise is added to their sum (McMahan et
al., "Learning Differentially Private Recurrent Language Models", ICLR 2018): by the coordinator, which is trusted then,
or by every silo under a mask (Kairouz, Liu, Steinke, ICML 2021), so that nobody is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from fedlm.recipe.data_checks import Problem, all_sources, changed, template_problems
from fedlm.recipe.guards import MASK, mask_of
from fedlm.recipe.methods import ALGORITHMS, Method
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

if TYPE_CHECKING:
    from fedlm.recipe.schema import Recipe
    from fedlm.recipe.source import SourceSpec

LARGEST_EPSILON = 100.0
"""Above it a guarantee is empty: odds may change by e^100."""


class AdaptiveSpec(Strict):
    """A clip that follows a quantile of the norms of updates, under the same budget (Andrew, Thakkar, McMahan,
    Ramaswamy, NeurIPS 2021): each silo tells whether its update was within the clip, under a mask in the sum alone, and
    the count gets noise."""

    quantile: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="Share of updates within the clip.")
    rate: PositiveFloat = Field(
        0.2, description="By which the clip's logarithm moves: rate x (quantile - share within)."
    )
    count_noise: PositiveFloat | None = Field(
        None,
        description="Standard deviation of the noise on the count; under a mask of that of the fewest silos that must "
        "be in a sum and keep theirs to themselves. Default: a twentieth of a round's silos, and at least the noise "
        "multiplier that the budget asks for: updates get at most 1.16 times its noise then.",
    )


class PrivacySpec(Strict):
    """Differential privacy of what leaves, for a whole run."""

    unit: Literal["example", "user", "silo"] = Field(
        description="Whose data is protected as a whole: 'example': one row of a silo, by noise in its training; "
        "'user': all rows of a person in a silo, likewise; 'silo': all rows of an organisation, by noise on the sum of "
        "updates: of the silos' own under a mask, else of the coordinator's."
    )
    epsilon: Annotated[float, Field(gt=0.0, le=LARGEST_EPSILON)] = Field(
        description="Of the whole run; noise is calibrated to it."
    )
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        description="Below 1 over the units: a silo's rows or users, or the silos."
    )
    clip: PositiveFloat = Field(
        1.0,
        description="Largest L2 norm of what a unit adds: of an example's gradient, of the mean of a user's, "
        "or of a silo's update.",
    )
    mechanism: Literal["dp-sgd", "dp-ftrl"] = Field(
        "dp-sgd",
        description="Of `unit: example` and `user`: rows, or users, of a step are drawn at random in secret (dp-sgd); "
        "or come in a fixed cyclic order, with noise that is correlated across steps (dp-ftrl).",
    )
    bands: PositiveInt | None = Field(
        None,
        description="Of dp-ftrl: steps over which noise is correlated, at most the batches in a pass over the silo's "
        "rows. Default: those with the least error of sums over steps, at most 32.",
    )
    user: str | None = Field(
        None,
        min_length=1,
        description="Of `unit: user`: the column, or a template over columns, that says whose a row is. A source's "
        "`columns.user` goes before it. It stays in the silo.",
    )
    user_examples: PositiveInt = Field(
        4, description="Of `unit: user`: rows of a user that a step takes at most, drawn anew each time."
    )
    adaptive: AdaptiveSpec | None = Field(
        None, description="Of `unit: silo`: `clip` is where it begins, and moves every round."
    )
    noise: Literal["discrete-gaussian", "skellam"] = Field(
        "skellam", description="Of `unit: silo` under a mask: whole numbers that each silo adds."
    )
    figures: Literal["withheld", "open"] = Field(
        "withheld",
        description="Losses, accuracies, counts and times of silos: none leaves, and silos measure nothing; or 'open': "
        "they leave as they are, outside the guarantee.",
    )


IN_TRAINING = ("example", "user")
"""Units that a silo protects by noise inside its training."""


def noised_in_training(recipe: Recipe) -> bool:
    """Whether each silo adds noise to its gradients."""
    return recipe.privacy is not None and recipe.privacy.unit in IN_TRAINING


def by_user(recipe: Recipe) -> bool:
    """Whether all rows of a person are protected together."""
    return recipe.privacy is not None and recipe.privacy.unit == "user"


def user_of(recipe: Recipe, source: SourceSpec) -> str | None:
    """The column that says whose the rows of a source are; None where nobody asks."""
    if recipe.privacy is None or not by_user(recipe):
        return None
    return source.columns.user or recipe.privacy.user


def noised_by_silos(recipe: Recipe) -> bool:
    """Whether silos add the noise that protects them as a whole, under masks."""
    return recipe.privacy is not None and recipe.privacy.unit == "silo" and mask_of(recipe) is not None


def withheld(recipe: Recipe) -> bool:
    """Whether silos keep every figure about their rows to themselves."""
    return recipe.privacy is not None and recipe.privacy.figures == "withheld"


def privacy_problems(recipe: Recipe) -> Iterator[Problem]:
    """What no accountant covers, and what would leave beside it."""
    spec = recipe.privacy
    if spec is None:
        return
    name, method = recipe.federation.algorithm.name, ALGORITHMS[recipe.federation.algorithm.name]
    if reason := not_by_example(name, method) if spec.unit in IN_TRAINING else not_by_silo(method):
        yield ("privacy", "unit"), f"'{spec.unit}' not with '{name}': {reason}"
    if recipe.search is not None or recipe.in_context is not None:
        yield ("privacy",), "covers training alone, and nothing is trained here"
    yield from _trainings(recipe)
    yield from (_in_training if spec.unit in IN_TRAINING else _silos)(recipe)
    yield from _users(recipe, spec)
    for field in ("selection", "augment", "instructions"):
        if getattr(recipe.data, field) is not None:
            yield (
                ("data", field),
                "not under `privacy`: what is trained on would depend on rows in ways that no noise covers",
            )
    if recipe.federation.patience is not None:
        yield ("federation", "patience"), "not under `privacy`: when to stop is told by losses without noise"
    for field in ("seconds", "processes", "shards"):
        if any(field in capacity.given for capacity in recipe.federation.capacity.all):
            yield ("federation", "capacity"), f"`{field}` not under `privacy`"


def not_by_example(name: str, method: Method) -> str:
    """Why updates of this method tell more of a row, or a user, than noised gradients do; empty where they do not."""
    if method.asynchronous:
        return "nobody knows beforehand how often a silo trains"
    if method.zeroth_order or method.losses or name == "fedbiscuit":
        return "it tells losses of rows, not only what was trained by noised gradients"
    if method.setup_rounds:
        return "its first round sends sketches of gradients without noise"
    if method.personal:
        return "a silo trains a model of its own beside the common one, on the same examples"
    if method.between_steps and name != "fedprox":
        return "it changes weights or gradients between steps, and is not known to do so from noised values alone"
    return ""


def not_by_silo(method: Method) -> str:
    """Why noise on the sum of updates does not protect a silo with this method; empty where it does."""
    if method.asynchronous:
        return "there is no sum over a round to add noise to"
    if not method.linear:
        return "its server computes other things from updates than their sum, and noise is added to the sum"
    return method.no_masks


def _trainings(recipe: Recipe) -> Iterator[Problem]:
    if recipe.training.steps is None:
        yield ("training", "steps"), "needed under `privacy`: epochs would tell how many rows a silo has"
    if recipe.federation.algorithm.weights == "tokens":
        yield (
            ("federation", "algorithm", "weights"),
            "'tokens' not under `privacy`: they follow from rows",
        )


def _in_training(recipe: Recipe) -> Iterator[Problem]:
    training, spec = recipe.training, recipe.privacy
    unread = ALGORITHMS[recipe.federation.algorithm.name].without
    assert spec is not None
    here = f"`privacy.unit: {spec.unit}`"
    if changed(spec, "noise"):
        yield ("privacy", "noise"), f"has no effect with {here}"
    if spec.bands is not None and spec.mechanism != "dp-ftrl":
        yield ("privacy", "bands"), "has no effect without `privacy.mechanism: dp-ftrl`"
    if spec.adaptive is not None:
        yield ("privacy", "adaptive"), f"not with {here}: an example's clip, or a user's, stays what it is"
    for field, reason in (
        ("clip_norm", f"it clips a step's mean gradient, and privacy clips each {spec.unit}'s: set it to null"),
        ("spike_guard", "it skips steps by losses before noise"),
        ("compile", "compiled layers do not show what they read"),
        ("gradient_checkpointing", "layers would be read twice"),
    ):
        if field not in unread and getattr(training, field) not in (None, False):
            yield ("training", field), f"not with {here}: {reason}"
    if changed(training, "order"):
        yield ("training", "order"), f"has no effect with {here}: the mechanism says which {spec.unit}s are in a step"
    facts = TASKS[recipe.task]
    if not facts.one_per_row and spec.unit == "example":
        yield ("task",), f"'{recipe.task}' cuts a row into many examples, and each would be protected by itself only"
    coupled = {
        "reinforce": "answers are written for a whole step at once",
        "group-preference": "rows are predicted from a context of other rows",
    }
    if spec.unit == "example":
        coupled["selector"] = "a row is asked in both orders, and each question would be protected by itself only"
    if recipe.task in coupled:
        yield ("task",), f"'{recipe.task}' not with {here}: {coupled[recipe.task]}"
    if recipe.task == "preference" and recipe.preference.loss == "kto":
        yield ("preference", "loss"), f"'kto' not with {here}: its baseline is made of other rows"
    if recipe.task == "preference" and recipe.preference.weights:
        yield ("preference", "weights"), f"not with {here}: they depend on how many rows there are"


def _users(recipe: Recipe, spec: PrivacySpec) -> Iterator[Problem]:
    if not by_user(recipe):
        for field in ("user", "user_examples"):
            if changed(spec, field):
                yield ("privacy", field), f"has no effect with `privacy.unit: {spec.unit}`"
        return
    if spec.user is not None:
        yield from template_problems(spec.user, ("privacy", "user"))
    algorithm = recipe.federation.algorithm
    if not ALGORITHMS[algorithm.name].equal_weights and algorithm.weights != "equal":
        yield (
            ("federation", "algorithm", "weights"),
            "'equal' is needed with `privacy.unit: user`: how many rows a silo has tells of its users",
        )
    for path, source in all_sources(recipe.data):
        if user_of(recipe, source) is None:
            yield (
                (*path, "columns", "user"),
                "`privacy.unit: user` needs the column that says whose a row is: name it here, or in `privacy.user`",
            )


def _silos(recipe: Recipe) -> Iterator[Problem]:
    algorithm = recipe.federation.algorithm
    for field in ("mechanism", "bands"):
        if recipe.privacy is not None and changed(recipe.privacy, field):
            yield ("privacy", field), "has no effect with `privacy.unit: silo`"
    if not ALGORITHMS[algorithm.name].equal_weights and algorithm.weights != "equal":
        yield (
            ("federation", "algorithm", "weights"),
            "'equal' is needed with `privacy.unit: silo`: noise hides what a silo adds up to the clip, and not more",
        )
    if any(guard.name != MASK for guard in recipe.guards):
        yield ("guards",), "only a mask with `privacy.unit: silo`: a clipped update must arrive as it is"
    mask = mask_of(recipe)
    for field in ("bound", "max_weight"):
        if mask is not None and changed(mask, field):
            yield ("guards", 0, field), "has no effect with `privacy.unit: silo`: the clip and equal weights say it"
    if mask is None and recipe.privacy is not None and changed(recipe.privacy, "noise"):
        yield ("privacy", "noise"), "has no effect without the guard 'mask'"
    for field in ("rank", "layers", "targets", "memory"):
        if any(field in capacity.given for capacity in recipe.federation.capacity.all):
            yield (
                ("federation", "capacity"),
                f"`{field}` not with `privacy.unit: silo`: fewer silos would share a mean",
            )
