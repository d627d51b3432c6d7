"""The rows of the table as data: which methods, in which groups, and what each needs that differs from the recipe.

A method of the registry without a row of its own here gets one by its name, so none is ever left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedlm.errors import RunError, nearest
from fedlm.recipe.methods import ALGORITHMS, Method


@dataclass(frozen=True)
class Row:
    """One row of the table: a method as it is run here."""

    name: str
    method: str
    """Its name in the registry."""
    group: str
    lr: float = 1.0
    """The middle of its learning rates as a multiple of the recipe's."""
    server_lr: float | None = None
    """The middle of the server's rates, for methods whose own step these are: then they are tuned in place of the
    silos' rate, which stays the recipe's times `lr`."""
    spacing: float = 3.0
    """Between neighbouring learning rates."""
    steps: int = 1
    """Local steps as a multiple of the recipe's; above 1 for methods whose steps are no gradient steps."""
    rank: float = 1.0
    """Of the adapter, as a multiple of the recipe's; alpha follows, so that alpha / rank stays."""
    ranks: tuple[float, ...] = ()
    """Dealt to the silos in turn, as multiples of the row's rank."""
    buffer: int = 1
    """Updates of a server step, for asynchronous methods."""
    change: tuple[str, ...] = ()
    """Further changes of the recipe, as `--set` takes them."""
    note: str = ""

    @property
    def facts(self) -> Method:
        return ALGORITHMS[self.method]


GROUPS = {
    "lora": "Aggregation of LoRA factors",
    "optimiser": "Rules for any adapter",
    "personal": "A model for every silo",
    "merge": "Merging once or in closed form",
    "robust": "Against bad silos",
    "mixed": "Silos of different ranks",
    "compression": "Fewer bytes",
    "asynchronous": "Without waiting for the slowest",
    "full": "All weights",
    "zeroth": "Without gradients",
}
"""In the order that they are shown in."""

_MERGES = ("lorm", "task-arithmetic", "ties")
_BUFFER = 3
_THIRDS = (0.25, 0.5, 1.0)
_WIDE = 10.0
"""Between the rates of Fed-SB: the best is LoRA's on one model and ten times LoRA's on another."""
_GOES_ON = ("training.keep_optimizer=true",)
_INT4_ALONE = ("guards=[{name: int4}]",)
_INT4 = ("guards=[{name: int4, error_feedback: true}]",)

ROWS = (
    Row("fedit", "fedit", "lora"),
    Row("frlora", "frlora", "lora", lr=0.3),
    Row("fed-sb", "fed-sb", "lora", spacing=_WIDE),
    Row("lora-xs", "lora-xs", "lora", spacing=_WIDE),
    Row("fedavgm", "fedavgm", "optimiser", server_lr=0.1),
    Row("fedadam", "fedadam", "optimiser", server_lr=0.003),
    Row("fedyogi", "fedyogi", "optimiser", server_lr=0.003),
    Row("partial-prefix", "partial-prefix", "personal", lr=20.0, note="a prefix, no weights"),
    Row("feddyn", "feddyn", "optimiser", lr=1 / 3),
    Row("diloco", "diloco", "optimiser", change=_GOES_ON),
    Row(
        "streaming-diloco",
        "streaming-diloco",
        "optimiser",
        change=(*_GOES_ON, "federation.algorithm.fragments=2", "federation.downlink={send: changed}"),
        note="half of the layers in a round",
    ),
    Row("eager-diloco", "eager-diloco", "optimiser", change=_GOES_ON),
    Row("ties", "ties", "merge", lr=1 / 3),
    Row("fedadagrad", "fedadagrad", "optimiser", server_lr=0.03),
    Row("flexlora-mixed", "flexlora", "mixed", ranks=_THIRDS),
    Row("hetlora-mixed", "hetlora", "mixed", ranks=_THIRDS),
    Row("flora-mixed", "flora", "mixed", ranks=_THIRDS),
    Row("fedit-smallest", "fedit", "mixed", rank=0.25, note="every silo at the smallest rank"),
    Row("fedit+int8", "fedit", "compression", change=("guards=[{name: int8, error_feedback: true}]",)),
    Row("fedit+int4", "fedit", "compression", change=_INT4),
    Row(
        "fedit+int4-both-ways",
        "fedit",
        "compression",
        change=(*_INT4, "federation.downlink={send: changed, guards: [{name: int8}]}"),
    ),
    Row("fedit+topk", "fedit", "compression", change=("guards=[{name: topk, density: 0.05, error_feedback: true}]",)),
    Row("ffa-lora+int4", "ffa-lora", "compression", change=_INT4),
    Row("fed-sb+int4", "fed-sb", "compression", spacing=_WIDE, change=_INT4_ALONE),
    Row("fed-sb-x4+int4", "fed-sb", "compression", spacing=_WIDE, rank=4.0, change=_INT4_ALONE, note="rank times 4"),
    Row("fedbuff", "fedbuff", "asynchronous", buffer=_BUFFER, change=(f"federation.algorithm.buffer={_BUFFER}",)),
    Row(
        "delayed-nesterov",
        "delayed-nesterov",
        "asynchronous",
        change=(f"federation.algorithm.buffer={_BUFFER}",),
    ),
    Row("fedavg-full", "fedavg", "full", lr=0.1, change=("adapter={kind: full}",), note="every weight travels"),
    Row("ferret", "ferret", "full", lr=2e-2 / 3, note="rate of about K / d of plain training's"),
    Row("fedkseed", "fedkseed", "zeroth", lr=0.02, steps=5),
    Row("fedmezo", "fedmezo", "zeroth", lr=0.6, steps=5),
    Row("feedsign", "feedsign", "zeroth", server_lr=3e-5),
    Row("fedbpt", "fedbpt", "zeroth", note="a prompt, no weights; its steps have no rate"),
)


def all_rows() -> list[Row]:
    """Every row: those above, and one for each method that is not among them by its own name."""
    named = {row.name for row in ROWS}
    found = [*ROWS, *(Row(name, name, group_of(name)) for name in ALGORITHMS if name not in named)]
    return sorted(found, key=lambda row: list(GROUPS).index(row.group))  # the rest of the order stays


def group_of(method: str) -> str:
    """The group that a method belongs to by its facts."""
    facts = ALGORITHMS[method]
    if facts.asynchronous:
        return "asynchronous"
    if facts.personal:
        return "personal"
    if method in _MERGES:
        return "merge"
    if "robust_on" in facts.options:
        return "robust"
    if "lora" not in facts.adapters and "lora-sb" not in facts.adapters:
        return "zeroth" if facts.zeroth_order else "full"
    if facts.zeroth_order:
        return "zeroth"
    return "optimiser" if "full" in facts.adapters else "lora"


def choose(names: Sequence[str] | None, groups: Sequence[str] | None) -> list[Row]:
    """The rows of these names, or of these groups; all of them by default.

    Raises:
        RunError: an unknown name or group.
    """
    rows = all_rows()
    for wanted, known, option in (
        (names or (), [row.name for row in rows], "--methods"),
        (groups or (), list(GROUPS), "--groups"),
    ):
        for name in wanted:
            if name not in known:
                raise RunError(f"there is no '{name}'", where=option, fix=f"{nearest(name, known)} (fedlm bench rows)")
    return [row for row in rows if (names is None or row.name in names) and (groups is None or row.group in groups)]
