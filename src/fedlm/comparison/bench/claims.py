"""What papers claim of their methods, and whether this table shows it.

A claim of a lower loss holds where the 95 % interval of the paired differences lies below 0, and fails where it lies
above; between, nothing is decided. Base models and tasks differ from the papers', so only relations are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedlm.comparison.bench.table import difference
from fedlm.messages import Fields

YES, NO, OPEN, UNMEASURED = "reproduced", "not reproduced", "undecided", "not measured"


@dataclass(frozen=True)
class LowerLoss:
    """One row ends with a lower loss than another."""

    text: str
    paper: str
    row: str
    other: str

    def judge(self, rows: Mapping[str, Fields]) -> tuple[str, str]:
        found = difference(rows[self.row], rows[self.other])
        interval = found["difference_interval"]
        if interval is None:
            return OPEN, f"{found['difference']:+.4f} with one seed"
        verdict = YES if interval[1] < 0 else NO if interval[0] > 0 else OPEN
        return verdict, f"{found['difference']:+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}] nats per token"

    @property
    def needs(self) -> Sequence[str]:
        return (self.row, self.other)


@dataclass(frozen=True)
class Exact:
    """A row's aggregation is exact."""

    text: str
    paper: str
    row: str
    limit: float = 1e-5

    def judge(self, rows: Mapping[str, Fields]) -> tuple[str, str]:
        error = rows[self.row]["aggregation_error"]
        if error is None:
            return UNMEASURED, "no error was measured"
        return (YES if error < self.limit else NO), f"largest error {error:.1e}"

    @property
    def needs(self) -> Sequence[str]:
        return (self.row,)


@dataclass(frozen=True)
class FewerBytes:
    """A row sends up some times fewer bytes than another, and its loss is within a share of the other's."""

    text: str
    paper: str
    row: str
    other: str
    times: float
    within: float

    def judge(self, rows: Mapping[str, Fields]) -> tuple[str, str]:
        row, other = rows[self.row], rows[self.other]
        fewer, loss = other["bytes_up"] / row["bytes_up"], row["loss"] / other["loss"] - 1
        verdict = YES if fewer >= self.times and loss <= self.within else NO
        start = other["curve"][0][1]  # a loss that training hardly moves is easily kept: say how much of the gain is
        kept = f", {(start - row['loss']) / (start - other['loss']):.0%} of its gain" if start > other["loss"] else ""
        return verdict, f"{fewer:.1f}x fewer bytes up, loss {loss:+.2%}{kept}"

    @property
    def needs(self) -> Sequence[str]:
        return (self.row, self.other)


_PADDED, _SMALLEST = "hetlora-mixed", "fedit-smallest"

Claim = LowerLoss | Exact | FewerBytes

CLAIMS: tuple[Claim, ...] = (
    Exact("FedEx-LoRA aggregates exactly", "Singhal et al., ACL 2025", "fedex-lora"),
    Exact("FLoRA aggregates exactly", "Wang et al., NeurIPS 2024", "flora"),
    Exact("FFA-LoRA aggregates exactly", "Sun et al., ICLR 2024", "ffa-lora"),
    Exact("RoLoRA aggregates exactly", "Chen et al., NeurIPS 2025", "rolora"),
    Exact("Fed-SB aggregates exactly", "Singhal et al., 2025", "fed-sb"),
    LowerLoss("exact aggregation is better than averaging factors", "Singhal et al., ACL 2025", "fedex-lora", "fedit"),
    LowerLoss("stacking is better than averaging factors", "Wang et al., NeurIPS 2024", "flora", "fedit"),
    LowerLoss("alternating A and B is better than averaging both", "Chen et al., NeurIPS 2025", "rolora", "fedit"),
    LowerLoss("alternating A and B is better than freezing A", "Chen et al., NeurIPS 2025", "rolora", "ffa-lora"),
    LowerLoss("keeping B in the silo is better for its own text", "Guo et al., ICLR 2025", "fedsa-lora", "fedit"),
    LowerLoss("correcting B at the server is better than averaging", "Bian et al., ICCV 2025", "lora-fair", "fedit"),
    LowerLoss("aligning factors by rotation is better", "Zhang et al., ICML 2026", "fedrot-lora", "fedit"),
    LowerLoss("with mixed ranks, averaging products is better", "Bai et al., NeurIPS 2024", "flexlora-mixed", _PADDED),
    Exact("FLoRA aggregates silos of different ranks exactly", "Wang et al., NeurIPS 2024", "flora-mixed"),
    LowerLoss("silos that can do more help those that cannot", "Bai et al., NeurIPS 2024", "flexlora-mixed", _SMALLEST),
    FewerBytes("a small square instead of factors, fp32", "Singhal et al., 2025", "fed-sb", "fedit", 90, 0.02),
    FewerBytes("4 bits with error feedback", "goal of this project", "fedit+int4", "fedit", 7, 0.01),
    FewerBytes("B alone, in 4 bits", "goal of this project", "ffa-lora+int4", "fedit", 14, 0.02),
    FewerBytes(
        "a square of four times the rank, in 4 bits", "goal of this project", "fed-sb-x4+int4", "fedit", 40, 0.02
    ),
    LowerLoss("control variates help where silos differ", "Karimireddy et al., ICML 2020", "scaffold", "fedavg"),
    LowerLoss("a personal model is better on a silo's own text", "Li et al., ICML 2021", "ditto", "fedavg"),
    LowerLoss("an adaptive server is better than averaging", "Reddi et al., ICLR 2021", "fedadam", "fedavg"),
)


def judge_claims(rows: Mapping[str, Fields]) -> list[Fields]:
    """Every claim with its verdict on these rows and the figures behind it, as plain JSON."""
    found = []
    for claim in CLAIMS:
        absent = [name for name in claim.needs if name not in rows]
        verdict, figures = (UNMEASURED, f"no row {' and '.join(absent)}") if absent else claim.judge(rows)
        about = {"claim": claim.text, "paper": claim.paper, "rows": list(claim.needs)}
        found.append({**about, "verdict": verdict, "figures": figures})
    return found
