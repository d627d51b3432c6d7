"""Secure aggregation: the coordinator learns the sum of the silos' vectors and none of them.

The protocol of Bonawitz et al. (CCS 2017) on the k-regular graph of SecAgg+ (Bell et al., CCS 2020). Pure functions of
messages and kept state: nothing here knows engines, sockets or torch. `silo.Silo` and `coordinator.Coordinator` are the
two sides, `graph.choose` finds degree and threshold, `quantise` makes ring elements of floating-point updates.
"""

from __future__ import annotations

from fedlm.privacy.secagg.coordinator import Coordinator, Phase, Sum
from fedlm.privacy.secagg.graph import Design, Risk, choose
from fedlm.privacy.secagg.message import Message
from fedlm.privacy.secagg.parameters import Parameters
from fedlm.privacy.secagg.policy import Policy
from fedlm.privacy.secagg.quantise import Encoding, decode, encode
from fedlm.privacy.secagg.silo import Silo
from fedlm.privacy.secagg.state import State

__all__ = [
    "Coordinator",
    "Design",
    "Encoding",
    "Message",
    "Parameters",
    "Phase",
    "Policy",
    "Risk",
    "Silo",
    "State",
    "Sum",
    "choose",
    "decode",
    "encode",
]
