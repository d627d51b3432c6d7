"""How updates become one model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from fedlm.errors import nearest
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.strict import Strict
from fedlm.recipe.types import Fraction


class AlgorithmSpec(Strict):
    """How updates become one model."""

    name: str = "fedavg"
    weights: Literal["tokens", "examples", "equal"] | None = Field(
        None,
        description="What a silo counts for in the mean: the examples it holds, their target tokens, or equal. "
        "Defaults: examples; delayed-nesterov, eager-diloco, fedasync, fedbpt, feddyn, feedsign, hetlora, scaffold, "
        "task-arithmetic, ties, and the rules against bad silos but for norm-bound and rfa: always equal.",
    )
    mu: Annotated[float, Field(ge=0.0)] = Field(0.01, description="fedprox, fedasync: strength of the proximal term.")
    server_lr: PositiveFloat | None = Field(
        None,
        description="Defaults: 1.0; adaptive rules 1e-3, on adapters 5e-3 (fedadagrad 3e-2); task-arithmetic 0.3; "
        "feedsign 1e-4; fedasync 0.6 (alpha); diloco and its relatives 0.7.",
    )
    server_momentum: Fraction = Field(
        0.9, description="fedavgm, partial-prefix, diloco and its relatives; beta1 of the adaptive rules."
    )
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
    layer_share: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.5, description="partial-prefix: share of the layers that travel from the second round on."
    )
    clusters: Annotated[int, Field(ge=2)] = Field(2, description="ifca, fedbiscuit: number of models.")
    warm_rounds: PositiveInt = Field(
        1, description="fedbiscuit: rounds in which all silos train one model, for each model before there are groups."
    )
    regroup: Annotated[int, Field(ge=2)] = Field(
        4,
        description="fedbiscuit: rounds from one grouping of the silos to the next; never 1, since the losses that it "
        "goes by are a round old, and two groups could change places for ever.",
    )
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
        description="fedex-lora, flora, frlora, and `robust_on: product`: cut what is merged into a layer to this "
        "rank; it grows round by round.",
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

    byzantine: Annotated[int, Field(ge=0)] = Field(
        1,
        description="Rules against bad silos: f, how many of a round's silos may send anything. Fewer answers than the "
        "rule needs for it are an error: krum, multi-krum 2f + 3, bulyan 4f + 3, centred-clipping, flame, median, rfa, "
        "trimmed-mean 2f + 1.",
    )
    groups: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Rules against bad silos: the round's silos are dealt to this many random groups, updates are "
        "added up within them, and the rule sees the groups' means alone. f bad silos spoil at most f groups, so that "
        "`byzantine` counts both.",
    )
    robust_on: Literal["factors", "product"] = Field(
        "factors",
        description="Rules against bad silos, with LoRA: whether updates are compared as A and B travel, or as the "
        "changes of s B A, which are what acts. Then what does not fit the rank is merged beside the frozen weights.",
    )
    selected: PositiveInt | None = Field(
        None, description="multi-krum: m, the updates that are averaged; default: as many as answered, less f + 2."
    )
    smoothing: PositiveFloat = Field(
        1e-6, description="rfa: nu, the distance below which updates no longer count for more the nearer they are."
    )
    norm_bound: PositiveFloat | None = Field(
        None, description="norm-bound: M, the largest norm of an update; default: the median of the round's norms."
    )
    clip_radius: PositiveFloat | None = Field(
        None,
        description="centred-clipping: tau, how far from the centre an update may pull; default: the median of the "
        "round's distances from it.",
    )
    clip_iterations: PositiveInt = Field(1, description="centred-clipping: steps of the centre in a round.")
    root: str | None = Field(
        None,
        min_length=1,
        description="fltrust: the silo that the coordinator trusts. Its text is the root data: its update says which "
        "way is right and how far a silo may go, and is no part of the mean.",
    )
    confidence: PositiveFloat = Field(
        1.0, description="foolsgold: kappa, how sharply silos of a like history are told from the others."
    )
    noise: Annotated[float, Field(ge=0.0)] | None = Field(
        None,
        description="flame: lambda, the noise on every value as a share of the norm to which updates are clipped. Of d "
        "values together it is lambda sqrt(d) of that norm; default: 0.1 of it.",
    )

    fragments: PositiveInt = Field(
        4, description="streaming-diloco: P, parts of the model that are synchronised in turn, one a round."
    )
    pattern: Literal["strided", "sequential"] = Field(
        "strided", description="streaming-diloco: layer l belongs to fragment l mod P, or neighbours lie together."
    )
    overlap: Annotated[int, Field(ge=0)] = Field(
        0,
        description="streaming-diloco: tau, local steps of the next round before a synchronised fragment is mixed in.",
    )
    mixing: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.0, description="streaming-diloco: alpha, the silo's own share in a synchronised fragment."
    )

    population: Annotated[int, Field(ge=4)] = Field(20, description="fedbpt: candidates of a silo's step.")
    sigma: PositiveFloat = Field(
        1.0, description="fedbpt: the first step size; at 1 candidates differ from the prompt as words do from zero."
    )
    perturb: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5,
        description="fedbpt: a candidate's loss is divided by that on a copy of its batch with this share of tokens "
        "replaced; 0 divides by nothing.",
    )
    buffer: PositiveInt = Field(
        10,
        description="fedbuff: K, the updates that a server step takes; delayed-nesterov: N, those that its momentum "
        "takes in at once.",
    )
    momentum_share: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="delayed-nesterov: c, the momentum's part in the steps in which it is not refreshed; at most 1/N.",
    )
    staleness: Literal["constant", "polynomial", "hinge"] = Field(
        "polynomial",
        description="fedasync, fedbuff: how an update from a model of tau server steps ago is damped: not at all, by "
        "(tau + 1)^-a, or beyond tau = b by 1 / (a (tau - b) + 1).",
    )
    staleness_a: PositiveFloat | None = Field(None, description="a; defaults: polynomial 0.5, hinge 10.")
    staleness_b: Annotated[int, Field(ge=0)] = Field(4, description="b of the hinge.")
    max_staleness: Annotated[int, Field(ge=0)] = Field(
        50,
        description="Asynchronous: server steps after which a silo's work no longer counts and it gets new.",
    )

    def updates_needed(self) -> int:
        """Updates, or means of groups, among which a rule withstands `byzantine` bad ones; 1 for any other method."""
        withstands = ALGORITHMS[self.name].withstands
        return 1 if withstands is None else max(1, withstands[0] * self.byzantine + withstands[1])

    def updates_per_step(self) -> int:
        """Updates that a server step of an asynchronous federation takes."""
        return self.buffer if self.name == "fedbuff" else 1

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
