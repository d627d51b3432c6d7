"""What came of attacks that were tried on a run or a recipe, and what that says: figures alone, never text.

A trial is one attack on one configuration, beside what one gets without attacking. Each attack is also tried on a
configuration that is open to it, on the same rows: where it fails there, its failure elsewhere proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedlm.errors import RunError
from fedlm.evaluation.intervals import Interval
from fedlm.federation.disk import disk_errors
from fedlm.files import read_json, write_json

FILE = "attacks.json"
SCHEMA = 1

LEVEL = 0.025
"""One-sided: a trial is above its baseline by chance with at most this probability."""

ATTACKS: dict[str, str] = {
    "dager": "which tokens was an update computed on?",
    "membership": "was this row trained on?",
    "extraction": "does the model finish a row that it is shown the beginning of?",
    "canaries": "how well is a planted secret remembered, and which epsilon does that refute?",
}
"""What `fedlm audit attack` tries, and the question of each."""

NEVER: dict[str, str] = {
    "membership by shadow models (LiRA)": "it trains models of its own; in Python: fedlm.attacks.membership",
    "a property of all of a silo's rows": "it trains hundreds of shadow silos; in Python: fedlm.attacks.attributes",
    "gradient matching (LAMP)": "it guesses single short sequences, each for long; in Python: fedlm.attacks.lamp",
    "inversion by optimisation (TIGER)": "not part of fedlm; it needs less than DAGER does",
    "silos that mean ill": "they steer the model and read nothing; see docs/attacks.md",
}
"""Attacks that it does not try, and why."""


@dataclass(frozen=True)
class Trial:
    """One attack on one configuration.

    Attributes:
        attack: a key of `ATTACKS`.
        configuration: what was attacked, in words.
        figure: what `success`, `interval` and `baseline` measure.
        baseline: what is reached without the model or update that is attacked.
        above: whether the success is above the baseline by more than chance (`LEVEL`).
        counts: how many of what were attacked.
        open: a configuration that nothing protects, which the attack must beat.
        most: the largest success there is.
        note: what limits it.
    """

    attack: str
    configuration: str
    figure: str
    success: float
    interval: Interval | None
    baseline: float
    above: bool
    counts: dict[str, int]
    open: bool = False
    most: float = 1.0
    note: str = ""

    @property
    def beaten(self) -> bool:
        """Whether an open configuration fell: at least half of the way from the baseline to all there is."""
        return self.open and self.above and self.success >= (self.baseline + self.most) / 2


SUCCEEDS, NOT_ABOVE = "succeeds", "not above baseline"
PROVES_NOTHING = "proves nothing: failed on the open configuration too"
AS_IT_MUST, FAILED_OPEN = "succeeds, as it must here", "fails where nothing protects"


def verdict(trial: Trial, trials: Iterable[Trial]) -> str:
    """The trial in words, among all trials of the same audit."""
    if trial.open:
        return AS_IT_MUST if trial.beaten else FAILED_OPEN
    if trial.above:
        return SUCCEEDS
    opened = any(t.beaten for t in trials if (t.attack, t.figure) == (trial.attack, trial.figure))
    return NOT_ABOVE if opened else PROVES_NOTHING


@dataclass(frozen=True)
class Tried:
    """All that was tried on one run or recipe.

    Attributes:
        recipe: hex SHA-256 of the resolved recipe.
        trials: in the order of `ATTACKS`.
        left_out: by attack, why it was not tried.
        made: by attack that was tried, when (UTC).
    """

    recipe: str
    trials: tuple[Trial, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)

    def with_more(self, trials: Iterable[Trial], left_out: Mapping[str, str]) -> Tried:
        """With these in place of earlier ones of the same attacks; what was tried before is not made undone by a
        reason why it is not tried now."""
        found = tuple(trials)
        new = {t.attack for t in found}
        kept = [t for t in self.trials if t.attack not in new]
        order = list(ATTACKS)
        together = sorted([*kept, *found], key=lambda t: order.index(t.attack))
        tried = {t.attack for t in together}
        why = {name: reason for name, reason in {**self.left_out, **left_out}.items() if name not in tried}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Tried(self.recipe, tuple(together), why, {**self.made, **dict.fromkeys(sorted(new), now)})

    def not_tried(self) -> dict[str, str]:
        """Every attack that was not, and why."""
        tried = {t.attack for t in self.trials}
        own = {name: self.left_out.get(name, "was not asked for") for name in ATTACKS if name not in tried}
        return {**own, **NEVER}

    def as_json(self) -> dict[str, Any]:
        trials = [{**asdict(t), "verdict": verdict(t, self.trials)} for t in self.trials]
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "trials": trials,
            "left_out": self.left_out,
            "not_tried": self.not_tried(),
            "made": self.made,
        }

    def write(self, file: Path) -> None:
        """Raises RunError: the disk fails."""
        with disk_errors(file):
            write_json(file, self.as_json())


def read_tried(file: Path, recipe: str) -> Tried:
    """What `Tried.write` wrote; nothing tried where there is no file.

    Args:
        recipe: hex SHA-256 of the resolved recipe that is asked about.

    Raises:
        RunError: the file is damaged, or tells of another recipe.
    """
    if not file.exists():
        return Tried(recipe)
    try:
        stored = read_json(file)
        if stored["schema"] != SCHEMA:
            raise ValueError("another schema")
        trials = tuple(_trial(dict(t)) for t in stored["trials"])
        found = Tried(str(stored["recipe"]), trials, _words(stored["left_out"]), _words(stored["made"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(
            f"what attacks were tried cannot be read ({type(error).__name__})",
            where=str(file),
            fix="remove the file and try them again with `fedlm audit attack`",
        ) from None
    if found.recipe != recipe:
        raise RunError(
            "these attacks were tried on another recipe",
            where=str(file),
            fix="try them on this one: `fedlm audit attack`",
        )
    return found


def _trial(stored: dict[str, Any]) -> Trial:
    stored.pop("verdict")
    interval = stored.pop("interval")
    if stored["attack"] not in ATTACKS:
        raise ValueError("an attack of no name that is known")
    numbers = [float(stored.pop(name)) for name in ("success", "baseline", "most")]
    counts = {str(name): int(value) for name, value in stored.pop("counts").items()}
    whole = None if interval is None else (float(interval[0]), float(interval[1]))
    return Trial(**stored, interval=whole, success=numbers[0], baseline=numbers[1], most=numbers[2], counts=counts)


def _words(stored: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in stored.items()}
