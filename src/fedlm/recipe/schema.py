"""The recipe: one federation, described completely, as typed and validated data.

Unknown keys and impossible combinations fail at load. What a recipe must know of an algorithm (is it linear, does it
keep state in the silo ...) is declared as data in `fedlm.recipe.methods`, low in the import order.
Combinations that span fields are judged in `fedlm.recipe.checks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedlm.errors import nearest
from fedlm.recipe.algorithm import AlgorithmSpec
from fedlm.recipe.capacity import CapacitySpec
from fedlm.recipe.checks import problems
from fedlm.recipe.data import DataSpec, PartitionSpec, SiloSpec, SplitSpec
from fedlm.recipe.guards import DownlinkSpec, GuardSpec
from fedlm.recipe.heads import ClassifySpec, GroupPreferenceSpec, RewardSpec
from fedlm.recipe.model import AdapterSpec, ModelSpec
from fedlm.recipe.preference import PreferenceSpec
from fedlm.recipe.presets import with_seed
from fedlm.recipe.privacy import PrivacySpec
from fedlm.recipe.prompting import InContextSpec, SearchSpec, untrained
from fedlm.recipe.reinforce import ReinforceSpec
from fedlm.recipe.source import Columns, SourceSpec
from fedlm.recipe.speeds import SpeedSpec
from fedlm.recipe.start import StartSpec
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS
from fedlm.recipe.training import TrainingSpec
from fedlm.recipe.types import Name, Seed

__all__ = [
    "AdapterSpec",
    "AlgorithmSpec",
    "Columns",
    "DataSpec",
    "EvaluationSpec",
    "FederationSpec",
    "ModelSpec",
    "PartitionSpec",
    "PreferenceSpec",
    "Recipe",
    "SiloSpec",
    "SourceSpec",
    "SplitSpec",
    "StartSpec",
    "TrainingSpec",
]


class FederationSpec(Strict):
    """Rounds: who takes part, and what happens when someone does not answer."""

    rounds: PositiveInt = 4
    algorithm: AlgorithmSpec = AlgorithmSpec()
    sample: Literal["all"] | PositiveInt | Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        "all", description="Silos per round: all, a count, or a fraction."
    )
    oversample: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Share of extra silos invited; the first `sample` that answer are used."
    )
    quorum: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        1.0,
        description="Share of the round's sample that must answer, else the run stops; asynchronous: share of all "
        "silos whose last training did not fail.",
    )
    deadline: PositiveFloat | None = Field(
        None, description="Seconds per round; asynchronous: per training, in a simulation on the virtual clock."
    )
    retries: Annotated[int, Field(ge=0, le=10)] = Field(
        1, description="How often a request is sent again to a silo whose process died."
    )
    reconnect: PositiveFloat = Field(
        60.0, description="Seconds that a silo may be out of reach before it counts as unreachable (network runs)."
    )
    workers: PositiveInt | Literal["auto"] = Field("auto", description="Processes that train silos side by side.")
    threads: PositiveInt = Field(1, description="Torch threads per worker; part of what makes runs repeatable.")
    concurrency: Literal["all"] | PositiveInt = Field(
        "all", description="Asynchronous: silos at work at once, drawn from all; there are no samples of a round."
    )
    speeds: SpeedSpec = SpeedSpec()
    downlink: DownlinkSpec = DownlinkSpec()
    capacity: CapacitySpec = CapacitySpec()
    patience: PositiveInt | None = Field(
        None, description="Stop after this many rounds without a better validation loss."
    )
    keep: Literal["all", "best-and-last"] = Field("best-and-last", description="Which checkpoints stay on disk.")


class EvaluationSpec(Strict):
    """What is measured on held-out text."""

    every: PositiveInt = Field(1, description="Validate after every n-th round, and always after the last.")
    metrics: list[Literal["loss", "choice", "generation", "rouge", "exact_match", "f1"]] = Field(
        default_factory=lambda: ["loss"],  # type: ignore[arg-type]
        description="'choice': multiple choice by log-likelihood; 'generation': by generated text, with parse rate; "
        "'exact_match' and 'f1' (of words, as SQuAD has them) and 'rouge' (ROUGE-1, -2 and -L, F-measure): the last "
        "assistant turn of messages, written greedily by the model, against the row's own.",
        min_length=1,
    )
    max_examples: PositiveInt | None = Field(None, description="Rows per silo and role; a keyed subset.")
    silos: PositiveInt | None = Field(
        None, description="Measure on a fixed, keyed panel of this many silos; default: all of them."
    )
    batch_tokens: PositiveInt = Field(2048, description="Tokens per forward pass.")
    max_new_tokens: PositiveInt = Field(32, description="Of a generated answer.")


class Recipe(Strict):
    """One federation."""

    schema_version: Literal[1] = 1
    name: Name
    seed: Seed = 0
    task: str = Field("instruct", description=f"What is learnt: {', '.join(TASKS)}.")
    start: StartSpec | None = None
    model: ModelSpec
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec
    training: TrainingSpec
    preference: PreferenceSpec = PreferenceSpec()
    reinforce: ReinforceSpec = ReinforceSpec()
    federation: FederationSpec = FederationSpec()
    guards: list[GuardSpec] = Field(
        default_factory=list, description="What happens to an update before it leaves its silo, in this order."
    )
    privacy: PrivacySpec | None = None
    evaluation: EvaluationSpec = EvaluationSpec()
    classify: ClassifySpec = ClassifySpec()
    reward: RewardSpec = RewardSpec()
    group_preference: GroupPreferenceSpec = GroupPreferenceSpec()
    search: SearchSpec | None = None
    in_context: InContextSpec | None = None
    trackers: list[Literal["tensorboard", "mlflow"]] = Field(default_factory=list)

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        if name not in TASKS:
            raise ValueError(f"unknown task '{name}', {nearest(name, TASKS)}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _seeded(cls, data: Any) -> Any:
        return with_seed(untrained(data))

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        """Refuse impossible combinations, all at once; `load_recipe` reads their fields and lines from the context."""
        found = list(problems(self))
        if found:
            text = "; ".join(f"{'.'.join(map(str, path))}: {reason}" for path, reason in found)
            # the text is a context value, since pydantic would read braces in it as placeholders
            raise PydanticCustomError("impossible", "{text}", {"text": text, "problems": found})
        return self
