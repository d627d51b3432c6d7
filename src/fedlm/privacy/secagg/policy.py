"""What a silo insists on before it takes part, whatever the coordinator proposes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedlm.errors import AggregationRefused, RunError
from fedlm.privacy.secagg.graph import Risk, check_design
from fedlm.privacy.secagg.parameters import Parameters


@dataclass(frozen=True)
class Policy:
    """A silo's own terms.

    Attributes:
        minimum: silos, itself among them, that a sum must be over.
        risk: degree and threshold must be safe under it; with `risk.malicious` no round without signed lists.
        one_sum: whether a round of a run may have sums over only one set of silos, in all attempts together. Two sums
            over sets that differ in one silo tell its update; switch it off only where repeated attempts train anew.
    """

    risk: Risk
    minimum: int = 3
    one_sum: bool = True

    def check(self, silo: str, parameters: Parameters) -> None:
        """Raises AggregationRefused: this silo does not take part in an aggregation like that."""
        silos = len(parameters.silos)
        if silo not in parameters.silos:
            raise AggregationRefused("this silo does not take part", where=silo)
        if silos < self.minimum:
            raise AggregationRefused(
                f"{silos} silos are fewer than the {self.minimum} that this silo asks for", fix="ask more silos"
            )
        if self.risk.malicious and not parameters.malicious:
            raise AggregationRefused(
                "this silo only takes part where lists of survivors are signed", fix="expect a malicious coordinator"
            )
        try:
            check_design(silos, parameters.design, replace(self.risk, malicious=parameters.malicious))
        except RunError as error:
            raise AggregationRefused(error.what, fix=error.fix) from None

    def check_present(self, silo: str, parameters: Parameters, present: tuple[str, ...], did: str) -> None:
        """Raises AggregationRefused: a list lacks this silo, or is too short for a sum or for its own secrets."""
        if silo not in present:
            raise AggregationRefused("this silo is not on the list that it was sent")
        holders = len(parameters.among(silo, present)) + 1
        if len(present) < self.minimum or holders < parameters.design.threshold:
            raise AggregationRefused(
                f"{len(present)} silos {did}, {holders} of them holders of this silo's shares; it takes {self.minimum} "
                f"and a threshold of {parameters.design.threshold}",
                fix="wait until more silos are there",
            )
