"""Errors that a user reads: one sentence that says what is wrong, where, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedlmError(Exception):
    """A fault in the input, the machine or the run that the user can mend.

    The command line prints it as one sentence without a traceback and exits with code 2.

    Args:
        what: the fault, in plain words, never containing training text.
        where: file, line, recipe field or silo, if there is one.
        fix: what to do about it, if that is known.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.sentence())

    def sentence(self) -> str:
        prefix = f"{self.where}: " if self.where else ""
        suffix = f" Fix: {self.fix}" if self.fix else ""
        stop = "" if self.what.endswith((".", "?", "!")) else "."
        return f"{prefix}{self.what}{stop}{suffix}"


class RecipeError(FedlmError):
    """The recipe cannot be read, or asks for something that cannot be kept."""


class DataError(FedlmError):
    """A source of text is missing, malformed, or cannot be mapped."""


class PackageError(FedlmError):
    """A registry package cannot be fetched, has another hash, or holds unsafe paths."""


class ModelError(FedlmError):
    """A model, tokenizer or adapter cannot be loaded or does not fit."""


class TrainingError(FedlmError):
    """Local training cannot go on, for instance because the loss is not finite."""


class UpdateRefused(FedlmError):
    """A silo's update is non-finite, misshapen, incomplete or has an absurd weight."""


class AggregationRefused(FedlmError):
    """A party of secure aggregation refuses a message: malformed, forged, replayed, or asking for what would let one
    silo's update be read."""


class RunError(FedlmError):
    """A run cannot start, continue or be read: quorum, run directory, checkpoint."""


class NetworkError(FedlmError):
    """A kit, a certificate or a process between organisations is wrong, missing or does not answer."""


class PrivacyError(FedlmError):
    """A privacy guarantee cannot be computed or kept: no accountant covers it, or its ledger is damaged."""


class BudgetExceeded(PrivacyError):
    """A release would spend more privacy than the budget allows."""


class MissingExtra(FedlmError):
    """A feature needs an optional dependency that is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs the optional extra [{extra}]", fix=f"pip install 'fedlm[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint with the nearest valid names, or all of them when nothing is near.

    >>> nearest("fedavgg", ["fedavg", "fedprox"])
    "did you mean 'fedavg'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{c}'" for c in close) + "?"
    return "valid names: " + ", ".join(names)
