"""The silo: the door to private data, its private state, and the bench where its model stands."""

from fedlm.federation.silo.door import PROTOCOL, VERBS, Silo
from fedlm.federation.silo.workbench import POOLED, Workbench

__all__ = ["POOLED", "PROTOCOL", "VERBS", "Silo", "Workbench"]
