"""Pure measuring functions: (model, tokenizer, rows) -> counts, and counts of many silos -> one summary."""

from fedlm.evaluation.measure import measure
from fedlm.evaluation.summary import summarise

__all__ = ["measure", "summarise"]
