"""Attacks that were tried, as a table: attack by configuration, what came of it, and which were not tried."""

from __future__ import annotations

from fedlm.attacks.trial import ATTACKS, PROVES_NOTHING, SUCCEEDS, Tried, verdict
from fedlm.report.format import number
from fedlm.report.markup import e, table

HEAD = ["attack", "on", "of", "measured", "success (95 %)", "baseline", "verdict"]


def rows(tried: Tried) -> list[list[str]]:
    """A line for each trial, in the columns of `HEAD`."""
    found = []
    for trial in tried.trials:
        within = "" if trial.interval is None else f" ({number(trial.interval[0])} to {number(trial.interval[1])})"
        of = ", ".join(f"{value} {name}" for name, value in trial.counts.items())
        where = f"OPEN: {trial.configuration}" if trial.open else trial.configuration
        success = number(trial.success) + within
        words = verdict(trial, tried.trials)
        found.append([trial.attack, where, of, trial.figure, success, number(trial.baseline), words])
    return found


def sentence(tried: Tried) -> str:
    """What was tried and what came of it, in short."""
    if not tried.trials:
        return "No attack was tried."
    done = [name for name in ATTACKS if any(t.attack == name for t in tried.trials)]
    words = {t.attack: set[str]() for t in tried.trials}
    for trial in tried.trials:
        if not trial.open:
            words[trial.attack].add(verdict(trial, tried.trials))
    fell = [name for name in done if SUCCEEDS in words[name]]
    empty = [name for name in done if name not in fell and PROVES_NOTHING in words[name]]
    told = f"Tried: {', '.join(done)}. " + (f"{', '.join(fell)}: succeeds." if fell else "None succeeds.")
    if empty:
        told += f" Of {', '.join(empty)} nothing is proven: open configurations withstood too."
    return told


def notes(tried: Tried) -> list[str]:
    """What limits the trials."""
    return list(dict.fromkeys(f"{t.attack}: {t.note}" for t in tried.trials if t.note))


def section(tried: Tried) -> str:
    """Of the page."""
    body = [f"<h2>Attacks</h2><p>{e(sentence(tried))}</p>"]
    if tried.trials:
        main = [not t.open for t in tried.trials]
        body.append(table(HEAD, rows(tried), text=4, main=main))
        body.append(f"<p>{e(MEANING)}</p>")
        body += [f"<p>{e(line)}.</p>" for line in notes(tried)]
    body.append("<h3>Not tried</h3>" + table(["attack", "why"], list(tried.not_tried().items()), text=2))
    return "".join(body)


MEANING = (
    "OPEN is a configuration that nothing protects, on the same rows: where an attack fails there too, its failure "
    "says nothing. An attack that fails says that this attack fails; only differential privacy bounds all of them. "
    "These figures come from rows without noise, outside any budget: keep them where the rows are."
)
