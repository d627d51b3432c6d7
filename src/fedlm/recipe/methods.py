"""What a recipe must know of each algorithm, declared as data low in the import order."""

from __future__ import annotations

from dataclasses import dataclass

SOFT = ("prompt", "p-tuning", "prefix")
"""Kinds of adapter that are a trained prompt, whose parameters are averaged by name."""
PROMPTS = (*SOFT, "prompt-projection")
"""Kinds of adapter that are tokens before the text."""
KINDS = ("lora", "ia3", "full", *SOFT, "predictor")
BESIDE = (*PROMPTS, "predictor")
"""Kinds of adapter that change no weight of the model."""
FACTORS = ("lora", "lora-sb")
"""Kinds of adapter that have LoRA factors A and B."""


@dataclass(frozen=True)
class Method:
    """Facts that decide which combinations a recipe may ask for."""

    paper: str
    linear: bool
    """The new model is a function of the weighted sum of updates alone (so it can be masked or streamed)."""
    silo_state: bool = False
    """The silo keeps private tensors between rounds."""
    equal_weights: bool = False
    """Every silo counts the same: the recipe's `weights` can only be 'equal'."""
    options: tuple[str, ...] = ()
    """Fields of `federation.algorithm` that it reads, beside `weights` and `server_lr`."""
    adapters: tuple[str, ...] = KINDS
    """Kinds of adapter that it trains."""
    mixed_ranks: bool = False
    """Silos may have LoRA factors of different ranks."""
    partial: bool = False
    """Silos may train a part of the adapter: a tensor's mean is over the silos that trained it."""
    personal: bool = False
    """A silo is measured with a model of its own, part of which never leaves it."""
    min_rounds: int = 1
    """With fewer it is not the method."""
    without: tuple[str, ...] = ()
    """Fields of `training` that it never reads."""
    setup_rounds: int = 0
    """Rounds at the start in which nothing is trained yet."""
    server_rate: bool = True
    """The server's step has a rate, `server_lr`."""
    min_steps: int = 1
    """Local steps without which it is not the method."""
    principal: bool = False
    """LoRA factors start at the principal part of the frozen weights, not at the adapter's own first values."""
    losses: bool = False
    """It compares losses that silos measure, as other than a direction to train in."""
    zeroth_order: bool = False
    """Silos measure losses and no gradients; full weights are moved in place, in fp32."""
    between_steps: bool = False
    """In a silo it changes gradients or weights between local steps, and has whole tensors at hand for that."""
    same_steps: bool = False
    """All silos take the same number of local steps, which the recipe says."""
    asynchronous: bool = False
    """Silos get new work as soon as they have answered; a round is a server step."""
    plain_broadcast: bool = False
    """All that travels down are the averaged parameters by their own names: the way down may round them."""
    no_guards: str = ""
    """Why updates cannot be compressed; empty where they can."""
    no_feedback: str = ""
    """Why what compression lost in one round cannot be added to a later update; empty where it can."""
    needs_feedback: str = ""
    """Why it has to be added; empty where it need not."""
    goes_on: bool = False
    """Silos go on from where they stand, so rounds are parts of one training: all take part, and keep their
    optimiser."""
    heads: bool = False
    """It treats every trained tensor alike, whatever its name: a head beside the adapter is one of them."""
    no_continue: str = ""
    """Why it cannot go on with the adapter of another run; empty where it can."""
    withstands: tuple[int, int] | None = None
    """(a, b): a rule against bad silos that withstands f of them, `byzantine`, among at least a f + b."""
    no_product: str = ""
    """Why such a rule cannot work on the products of LoRA's factors, `robust_on: product`; empty where it can."""

    @property
    def no_masks(self) -> str:
        """Why updates cannot be hidden in their sum; empty where they can."""
        if self.asynchronous:
            return "silos answer one by one, and there is no sum over a round to hide in"
        if not self.linear:
            return "its server must see each silo's update"
        if self.needs_feedback:
            return f"what masks round away does not come back, and {self.needs_feedback}"
        if self.setup_rounds:
            return "its first round sends sketches, of other sizes than anything later"
        return self.no_guards and f"its updates stand no rounding: {self.no_guards}"


_ADAPTIVE = ("server_momentum", "beta2", "tau")
_BACKWARD = (
    "optimizer",
    "betas",
    "momentum",
    "weight_decay",
    "clip_norm",
    "gradient_checkpointing",
    "compile",
    "keep_optimizer",
    "spike_guard",
)
"""Fields of `training` that belong to gradients."""
_FEW = "an update is a few numbers that have no smaller form"
_DRIFT = "without it what the silos keep and the server's sum of it drift apart"
_TURNED = "a round's factors are written in a basis that no other round has"
_NO_STATE = "a silo begins anew before it is known which of its updates count, so it keeps nothing"

_ON = ("robust_on", "recompress")
_ROBUST = ("byzantine", "groups", *_ON)

_STALENESS = ("staleness", "staleness_a", "staleness_b", "max_staleness")
_FRAGMENTS = ("fragments", "pattern", "overlap", "mixing")

ALGORITHMS: dict[str, Method] = {
    "fedavg": Method(
        "McMahan et al., AISTATS 2017",
        linear=True,
        partial=True,
        plain_broadcast=True,
        heads=True,
    ),
    "fedprox": Method(
        "Li et al., MLSys 2020",
        linear=True,
        partial=True,
        options=("mu",),
        plain_broadcast=True,
        heads=True,
        between_steps=True,
    ),
    "fednova": Method(
        "Wang et al., NeurIPS 2020",
        linear=True,
        partial=True,
        plain_broadcast=True,
        no_guards="an update says by how many steps it was divided, and that may not be rounded",
        heads=True,
        between_steps=True,
    ),
    "scaffold": Method(
        "Karimireddy et al., ICML 2020",
        linear=True,
        partial=True,
        silo_state=True,
        equal_weights=True,
        needs_feedback=_DRIFT,
        heads=True,
        between_steps=True,
    ),
    "fedavgm": Method(
        "Hsu et al., 2019",
        linear=True,
        partial=True,
        options=("server_momentum",),
        plain_broadcast=True,
        heads=True,
    ),
    "fedadam": Method(
        "Reddi et al., ICLR 2021",
        linear=True,
        partial=True,
        options=_ADAPTIVE,
        plain_broadcast=True,
        heads=True,
    ),
    "fedyogi": Method(
        "Reddi et al., ICLR 2021",
        linear=True,
        partial=True,
        options=_ADAPTIVE,
        plain_broadcast=True,
        heads=True,
    ),
    "fedadagrad": Method(
        "Reddi et al., ICLR 2021",
        linear=True,
        partial=True,
        options=_ADAPTIVE,
        plain_broadcast=True,
        heads=True,
    ),
    "fedmezo": Method(
        "Ling et al., KDD 2024",
        linear=True,
        options=("zo_eps",),
        without=_BACKWARD,
        losses=True,
        zeroth_order=True,
        plain_broadcast=True,
        heads=True,
    ),
    "fedkseed": Method(
        "Qin et al., ICML 2024",
        linear=False,  # an update's scalars belong to other directions in each silo
        options=("seeds", "zo_eps"),
        adapters=("full",),
        without=_BACKWARD,
        losses=True,
        zeroth_order=True,
        no_guards=_FEW,
    ),
    "feedsign": Method(
        "Cai et al., 2025",
        linear=False,
        equal_weights=True,
        options=("zo_eps",),
        adapters=("full",),
        without=(*_BACKWARD, "lr", "schedule", "warmup", "final_lr"),
        losses=True,
        zeroth_order=True,
        same_steps=True,
        no_guards=_FEW,
    ),
    "ferret": Method(
        "Shu et al., ICML 2025",
        linear=True,
        options=("seeds", "per_block"),
        adapters=("full",),
        no_feedback="a round's coordinates belong to bases that no other round has",
    ),
    "fedbpt": Method(
        "Sun et al., ICML 2024",
        linear=False,
        equal_weights=True,
        options=("population", "sigma", "perturb"),
        adapters=("prompt-projection",),
        without=(*_BACKWARD, "lr", "schedule", "warmup", "final_lr"),
        losses=True,
        zeroth_order=True,
        server_rate=False,
        no_guards=_FEW,
    ),
    "feddyn": Method(
        "Acar et al., ICLR 2021",
        linear=True,
        partial=True,
        silo_state=True,
        equal_weights=True,
        options=("dyn_alpha",),
        server_rate=False,
        plain_broadcast=True,
        needs_feedback=_DRIFT,
        heads=True,
        between_steps=True,
    ),
    "ditto": Method(
        "Li et al., ICML 2021",
        linear=True,
        silo_state=True,
        options=("ditto_lambda",),
        personal=True,
        plain_broadcast=True,
        heads=True,
        between_steps=True,
    ),
    "feddpa": Method(
        "Yang et al., NeurIPS 2024",
        linear=True,
        silo_state=True,
        options=("local_weight",),
        adapters=("lora",),
        personal=True,
        plain_broadcast=True,
    ),
    "fedrep": Method(
        "Collins et al., ICML 2021",
        linear=True,
        silo_state=True,
        options=("personal_part", "head_share"),
        adapters=("lora", "ia3"),
        personal=True,
        min_steps=2,
        plain_broadcast=True,
        between_steps=True,
    ),
    "ifca": Method(
        "Ghosh et al., NeurIPS 2020",
        losses=True,
        linear=False,
        silo_state=True,
        options=("clusters",),
        adapters=("lora", "ia3"),
        personal=True,
        min_rounds=2,
        without=("keep_optimizer",),
        no_guards="an update also says which model it belongs to, and is not for the same one in every round",
        heads=True,
    ),
    "fedbiscuit": Method(
        "Wu et al., ICLR 2025",
        linear=False,
        options=("clusters", "warm_rounds", "regroup"),
        adapters=("lora", "ia3"),
        min_rounds=3,
        without=("keep_optimizer",),
        no_guards="an update also says which model it belongs to, and in some rounds the losses of all",
        heads=True,
    ),
    "partial-prefix": Method(
        "after Che et al., EMNLP 2023",
        linear=True,
        silo_state=True,
        options=("layer_share", "server_momentum"),
        adapters=("prefix",),
        personal=True,
        min_rounds=2,
        no_feedback="after its first round fewer layers travel, and what was lost of the others would never arrive",
    ),
    "lorm": Method(
        "Salami et al., ICLR 2025",
        losses=True,
        linear=True,
        options=("gram_off_diagonal",),
        adapters=("lora",),
        min_rounds=2,
        without=("keep_optimizer",),
        no_guards="its server divides by Gram matrices of the updates, which rounding makes worthless",
    ),
    "frlora": Method(
        "Yan et al., ICLR 2025",
        linear=True,
        options=("recompress",),
        adapters=("lora",),
        without=("keep_optimizer",),
        principal=True,
        no_continue="its factors begin at the principal part of the frozen weights",
    ),
    "task-arithmetic": Method(
        "Ilharco et al., ICLR 2023",
        linear=True,
        partial=True,
        equal_weights=True,
        plain_broadcast=True,
        heads=True,
    ),
    "ties": Method(
        "Yadav et al., NeurIPS 2023",
        linear=False,
        equal_weights=True,
        options=("density",),
        plain_broadcast=True,
        heads=True,
    ),
    "krum": Method(
        "Blanchard et al., NeurIPS 2017",
        linear=False,
        equal_weights=True,
        options=_ROBUST,
        plain_broadcast=True,
        heads=True,
        withstands=(2, 3),
    ),
    "multi-krum": Method(
        "Blanchard et al., NeurIPS 2017",
        linear=False,
        equal_weights=True,
        options=(*_ROBUST, "selected"),
        plain_broadcast=True,
        heads=True,
        withstands=(2, 3),
    ),
    "median": Method(
        "Yin et al., ICML 2018",
        linear=False,
        equal_weights=True,
        options=_ROBUST,
        plain_broadcast=True,
        heads=True,
        withstands=(2, 1),
    ),
    "trimmed-mean": Method(
        "Yin et al., ICML 2018",
        linear=False,
        equal_weights=True,
        options=_ROBUST,
        plain_broadcast=True,
        heads=True,
        withstands=(2, 1),
    ),
    "bulyan": Method(
        "El Mhamdi et al., ICML 2018",
        linear=False,
        equal_weights=True,
        options=_ROBUST,
        plain_broadcast=True,
        heads=True,
        withstands=(4, 3),
    ),
    "rfa": Method(
        "Pillutla et al., IEEE TSP 2022",
        linear=False,
        options=(*_ROBUST, "smoothing"),
        plain_broadcast=True,
        heads=True,
        withstands=(2, 1),
    ),
    "norm-bound": Method(
        "Sun et al., 2019",
        linear=False,
        options=("groups", *_ON, "norm_bound"),
        plain_broadcast=True,
        heads=True,
    ),
    "centred-clipping": Method(
        "Karimireddy et al., ICML 2021",
        linear=False,
        equal_weights=True,
        options=("byzantine", "groups", "robust_on", "clip_radius", "clip_iterations"),
        plain_broadcast=True,
        heads=True,
        withstands=(2, 1),
        no_product="its centre, the last round's mean, would be a dense matrix for every layer",
    ),
    "fltrust": Method(
        "Cao et al., NDSS 2021",
        linear=False,
        equal_weights=True,
        options=(*_ON, "root"),
        plain_broadcast=True,
        heads=True,
    ),
    "foolsgold": Method(
        "Fung et al., RAID 2020",
        linear=False,
        equal_weights=True,
        options=("robust_on", "confidence"),
        plain_broadcast=True,
        heads=True,
        no_product="a silo's history, the sum of its updates, would be a dense matrix for every layer",
    ),
    "flame": Method(
        "after Nguyen et al., USENIX Security 2022",
        linear=False,
        equal_weights=True,
        options=("byzantine", *_ON, "noise"),
        plain_broadcast=True,
        heads=True,
        withstands=(2, 1),
    ),
    "fedit": Method("Zhang et al., ICASSP 2024", linear=True, partial=True, adapters=("lora",), plain_broadcast=True),
    "ffa-lora": Method("Sun et al., ICLR 2024", linear=True, partial=True, adapters=("lora",), plain_broadcast=True),
    "rolora": Method(
        "Chen et al., NeurIPS 2025",
        linear=True,
        partial=True,
        adapters=("lora",),
        min_rounds=2,
        without=("keep_optimizer",),
        plain_broadcast=True,
    ),
    "fedsa-lora": Method(
        "Guo et al., ICLR 2025", linear=True, silo_state=True, adapters=("lora",), personal=True, plain_broadcast=True
    ),
    "fedrot-lora": Method(
        "Zhang et al., ICML 2026",
        linear=True,
        partial=True,
        options=("rotation",),
        adapters=("lora",),
        plain_broadcast=True,
    ),
    "lora-fair": Method(
        "Bian et al., ICCV 2025",
        linear=False,
        partial=True,
        options=("fair_lambda",),
        adapters=("lora",),
        server_rate=False,
        plain_broadcast=True,
    ),
    "fedsvd": Method(
        "Lee et al., NeurIPS 2025",
        linear=True,
        partial=True,
        adapters=("lora",),
        without=("keep_optimizer",),
        no_feedback=_TURNED,
    ),
    "fed-sb": Method("Singhal et al., 2025", linear=True, adapters=("lora-sb",), min_rounds=2, setup_rounds=1),
    "lora-xs": Method("Balazy et al., 2024", linear=True, adapters=("lora-sb",), principal=True),
    "fedex-lora": Method(
        "Singhal et al., ACL 2025",
        linear=False,
        partial=True,
        options=("recompress",),
        adapters=("lora",),
        server_rate=False,
    ),
    "flora": Method(
        "Wang et al., NeurIPS 2024",
        linear=False,
        partial=True,
        options=("recompress",),
        adapters=("lora",),
        mixed_ranks=True,
        without=("keep_optimizer",),
        server_rate=False,
        no_feedback=_TURNED,
        no_continue="every round begins with a fresh one",
    ),
    "flexlora": Method(
        "Bai et al., NeurIPS 2024",
        linear=False,
        partial=True,
        options=("svd",),
        adapters=("lora",),
        mixed_ranks=True,
        without=("keep_optimizer",),
        server_rate=False,
        no_feedback=_TURNED,
    ),
    "hetlora": Method(
        "Cho et al., EMNLP 2024",
        linear=False,
        partial=True,
        silo_state=True,
        equal_weights=True,
        options=("rank_decay", "rank_penalty"),
        adapters=("lora",),
        mixed_ranks=True,
        without=("keep_optimizer",),
        server_rate=False,
        no_feedback="a silo's rank, and with it the shape of what it sends, may shrink",
        between_steps=True,
    ),
    "fedasync": Method(
        "Xie et al., 2019",
        linear=False,  # each update's weight is known when it arrives, and not where it would be masked
        asynchronous=True,
        equal_weights=True,
        options=("mu", *_STALENESS),
        no_feedback=_NO_STATE,
        heads=True,
        between_steps=True,
    ),
    "fedbuff": Method(
        "Nguyen et al., AISTATS 2022",
        linear=False,
        asynchronous=True,
        options=("buffer", *_STALENESS),
        no_feedback=_NO_STATE,
        heads=True,
    ),
    "diloco": Method(
        "Douillard et al., 2023", linear=True, partial=True, options=("server_momentum",), plain_broadcast=True
    ),
    "streaming-diloco": Method(
        "Douillard et al., 2025",
        linear=True,
        silo_state=True,
        options=("server_momentum", *_FRAGMENTS),
        adapters=("full", "lora"),
        same_steps=True,
        plain_broadcast=True,
        goes_on=True,
        between_steps=True,
    ),
    "eager-diloco": Method(
        "Kale et al., 2025",
        linear=True,
        silo_state=True,
        equal_weights=True,
        options=("server_momentum",),
        adapters=("full", "lora"),
        min_rounds=2,
        goes_on=True,
    ),
    "delayed-nesterov": Method(
        "Liu et al., 2024",
        linear=False,  # as fedbuff
        asynchronous=True,
        equal_weights=True,
        options=("server_momentum", "buffer", "momentum_share", "max_staleness"),
        no_feedback=_NO_STATE,
    ),
}
