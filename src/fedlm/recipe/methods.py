"""What a recipe must know of each algorithm, declared as data low in the import order."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("lora", "ia3", "full")
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
    zeroth_order: bool = False
    """Silos measure losses and no gradients; full weights are moved in place, in fp32."""
    same_steps: bool = False
    """All silos take the same number of local steps, which the recipe says."""
    asynchronous: bool = False
    """Silos get new work as soon as they have answered; a round is a server step."""


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
)
"""Fields of `training` that belong to gradients."""
_STALENESS = ("staleness", "staleness_a", "staleness_b", "max_staleness")

ALGORITHMS: dict[str, Method] = {
    "fedavg": Method("McMahan et al., AISTATS 2017", linear=True, partial=True),
    "fedprox": Method("Li et al., MLSys 2020", linear=True, partial=True, options=("mu",)),
    "scaffold": Method("Karimireddy et al., ICML 2020", linear=True, partial=True, silo_state=True, equal_weights=True),
    "fedavgm": Method("Hsu et al., 2019", linear=True, partial=True, options=("server_momentum",)),
    "fedadam": Method("Reddi et al., ICLR 2021", linear=True, partial=True, options=_ADAPTIVE),
    "fedyogi": Method("Reddi et al., ICLR 2021", linear=True, partial=True, options=_ADAPTIVE),
    "fedadagrad": Method("Reddi et al., ICLR 2021", linear=True, partial=True, options=_ADAPTIVE),
    "fedmezo": Method("Ling et al., KDD 2024", linear=True, options=("zo_eps",), without=_BACKWARD, zeroth_order=True),
    "fedkseed": Method(
        "Qin et al., ICML 2024",
        linear=False,  # an update's scalars belong to other directions in each silo
        options=("seeds", "zo_eps"),
        adapters=("full",),
        without=_BACKWARD,
        zeroth_order=True,
    ),
    "feedsign": Method(
        "Cai et al., 2025",
        linear=False,
        equal_weights=True,
        options=("zo_eps",),
        adapters=("full",),
        without=(*_BACKWARD, "lr", "schedule", "warmup", "final_lr"),
        zeroth_order=True,
        same_steps=True,
    ),
    "ferret": Method("Shu et al., ICML 2025", linear=True, options=("seeds", "per_block"), adapters=("full",)),
    "feddyn": Method(
        "Acar et al., ICLR 2021",
        linear=True,
        partial=True,
        silo_state=True,
        equal_weights=True,
        options=("dyn_alpha",),
        server_rate=False,
    ),
    "ditto": Method("Li et al., ICML 2021", linear=True, silo_state=True, options=("ditto_lambda",), personal=True),
    "feddpa": Method(
        "Yang et al., NeurIPS 2024",
        linear=True,
        silo_state=True,
        options=("local_weight",),
        adapters=("lora",),
        personal=True,
    ),
    "fedrep": Method(
        "Collins et al., ICML 2021",
        linear=True,
        silo_state=True,
        options=("personal_part", "head_share"),
        adapters=("lora", "ia3"),
        personal=True,
        min_steps=2,
    ),
    "ifca": Method(
        "Ghosh et al., NeurIPS 2020",
        linear=False,
        silo_state=True,
        options=("clusters", "cluster_noise"),
        adapters=("lora", "ia3"),
        personal=True,
    ),
    "lorm": Method(
        "Salami et al., ICLR 2025", linear=True, options=("gram_off_diagonal",), adapters=("lora",), min_rounds=2
    ),
    "frlora": Method(
        "Yan et al., ICLR 2025", linear=True, options=("recompress",), adapters=("lora",), principal=True
    ),
    "task-arithmetic": Method("Ilharco et al., ICLR 2023", linear=True, partial=True, equal_weights=True),
    "ties": Method("Yadav et al., NeurIPS 2023", linear=False, equal_weights=True, options=("density",)),
    "fedit": Method("Zhang et al., ICASSP 2024", linear=True, partial=True, adapters=("lora",)),
    "ffa-lora": Method("Sun et al., ICLR 2024", linear=True, partial=True, adapters=("lora",)),
    "rolora": Method(
        "Chen et al., NeurIPS 2025",
        linear=True,
        partial=True,
        adapters=("lora",),
        min_rounds=2,
        without=("keep_optimizer",),
    ),
    "fedsa-lora": Method("Guo et al., ICLR 2025", linear=True, silo_state=True, adapters=("lora",), personal=True),
    "fedrot-lora": Method(
        "Zhang et al., ICML 2026", linear=True, partial=True, options=("rotation",), adapters=("lora",)
    ),
    "lora-fair": Method(
        "Bian et al., ICCV 2025", linear=False, options=("fair_lambda",), adapters=("lora",), server_rate=False
    ),
    "fedsvd": Method("Lee et al., NeurIPS 2025", linear=True, adapters=("lora",), without=("keep_optimizer",)),
    "fed-sb": Method("Singhal et al., 2025", linear=True, adapters=("lora-sb",), min_rounds=2, setup_rounds=1),
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
    ),
    "fedasync": Method(
        "Xie et al., 2019",
        linear=False,  # each update's weight is known when it arrives, and not where it would be masked
        asynchronous=True,
        equal_weights=True,
        options=("mu", *_STALENESS),
    ),
    "fedbuff": Method("Nguyen et al., AISTATS 2022", linear=False, asynchronous=True, options=("buffer", *_STALENESS)),
}
