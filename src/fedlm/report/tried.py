"""Attacks that were tried, as a table: attack by configuration, what came of it, and which were not tried."""

from __future__ import annotations

from fedlm.attacks.trial import ATTACKS, PROVES_NOTHING, SUCCEEDS, Tried, verdict
from fedlm.report.format import number
from fedlm.report.markup import e, table

HEAD = ["attack", "on", "of", "measured", "verdict", "success (95 %)", "baseline"]


def rows(tried: Tried) -> list[list[str]]:
    """A line for each trial, in the columns of `HEAD`."""
    found = []
    for trial in tried.trials:
        within = "" if trial.interval is None else f" ({number(trial.interval[0])} to {number(trial.interval[1])})"
        of = ", ".join(f"{value} {name}" for name, value in trial.counts.items())
        where = f"OPEN: {trial.configuration}" if trial.open else trial.configuration
        success = number(trial.success) + within
        words = verdict(trial, tried.trials)
        found.append([trial.attack, where, of, trial.figure, words, success, number(trial.baseline)])
    return found


def sentence(tried: Tried) -> str:
    """What was tried and what came of it, in short."""
    if not tried.trials:
        return "No attack was tried."
    done = [name for name in ATTACKS if any(t.attack == name for t in tried.trials)]
    said = [(t, verdict(t, tried.trials)) for t in tried.trials if not t.open]
    fell = [name for name in done if any(t.attack == name and words == SUCCEEDS for t, words in said)]
    told = f"Tried: {', '.join(done)}. " + (f"{', '.join(fell)}: succeeds." if fell else "None succeeds.")
    empty = dict.fromkeys(f"{t.attack} ({t.figure})" for t, words in said if words == PROVES_NOTHING)
    if empty:
        told += f" Nothing is proven of {', nor of '.join(empty)}: the open configuration withstood too."
    return told


def notes(tried: Tried) -> list[str]:
    """What limits the trials."""
    return list(dict.fromkeys(f"{t.attack}: {t.note}" for t in tried.trials if t.note))


def section(tried: Tried) -> str:
    """Of the page."""
    body = [f"<h2>Attacks</h2><p>{e(sentence(tried))}</p>"]
    if tried.trials:
        main = [not t.open for t in tried.trials]
        body.append(table(HEAD, rows(tried), text=5, main=main))
        body.append(f"<p>{e(MEANING)}</p>")
        body += [f"<p>{e(line)}.</p>" for line in notes(tried)]
    body.append("<h3>Not tried</h3>" + table(["attack", "why"], list(tried.not_tried().items()), text=2))
    return "".join(body)


MEANING = (
    "OPEN is a configuration that nothing protects, on the same rows: where an attack fails there too, its failure "
    "says nothing. An attack that fails says that this attack fails; only differential privacy bounds all of them. "
    "These figures come from rows without noise, outside any budget: keep them where the rows are."
)
