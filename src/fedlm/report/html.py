"""report.html: one file that tells a stranger what a run did and whether it helped. No network, no other file.

Everything that comes from a run directory (names, labels, reasons, the recipe) is data and is escaped; a content policy
in the page forbids it to load anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedlm.files import write_atomic
from fedlm.report import plots
from fedlm.report.facts import GROUPS, Estimate, Group, RunFacts, estimate, fairness, metric_keys, read_run, spread
from fedlm.report.format import (
    MISSING,
    count,
    duration,
    higher_is_better,
    is_number,
    is_share,
    metric,
    metric_name,
    number,
    plural,
    size,
)
from fedlm.report.markup import card, document, e, figure, table
from fedlm.report.words import federation_sentence, masked, rows_kept, verdict

ROWS_KEPT = "How many rows a silo has does not leave it: this recipe's `privacy` protects that too."

ROWS = 40
"""A table of failures or silos shows this many rows and says how many it left out."""


COSTS = ("steps", "tokens", "tokens/s", "bytes up", "bytes down", "training time", "peak memory")


def write_report(run_dir: Path) -> Path:
    """Write run_dir/report.html from what the directory holds, also for an interrupted run; returns its path.

    Raises:
        RunError: there is no run in the directory, or its files are damaged.
    """
    path = run_dir / "report.html"
    write_atomic(path, page(read_run(run_dir)).encode())
    return path


def page(facts: RunFacts) -> str:
    """The whole page."""
    sections = [
        _header(facts),
        _headline(facts),
        _comparison(facts),
        _held_out(facts),
        _learning(facts),
        _method(facts),
        _data(facts),
        _cost(facts),
        _failures(facts),
        _reproduce(facts),
    ]
    return document(f"{facts.name} · fedlm report", "".join(sections))


def with_interval(key: str, found: Estimate | None, between: str = " ") -> str:
    """`84.0 % [76.8, 91.2]`; with a line feed between where columns are many."""
    if found is None:
        return MISSING
    value = metric(key, found.value)
    return value + (f"{between}{_interval(key, found)}" if found.low is not None else "")


def _interval(key: str, found: Estimate) -> str:
    if found.low is None or found.high is None:
        return ""
    if is_share(key):
        return f"[{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"[{number(found.low)}, {number(found.high)}]"


# the sections


def _header(facts: RunFacts) -> str:
    status = str(facts.run.get("status") or ("comparison" if facts.comparison else "unknown"))
    created = str(facts.run.get("created", ""))[:19].replace("T", " ")
    stamp = " · ".join(e(part) for part in (facts.run.get("run", ""), created and f"{created} UTC") if part)
    return (
        f'<header><h1>{e(facts.name)} <span class="badge {e(status)}">{e(status)}</span></h1><p>{stamp}</p>'
        f'<p class="lead">{e(federation_sentence(facts))}</p></header>'
    )


def _headline(facts: RunFacts) -> str:
    groups = facts.groups()
    if groups:
        key = _main_metric(groups)
        cards = [] if key is None else [_arm_card(group, key) for group in groups]
    else:
        before, after, rows = facts.before_after()
        keys = metric_keys([before, after] if before and after else [after or before])[:3]
        begun = first_model(facts)
        cards = [_change_card(key, estimate(before, key), estimate(after, key), rows, begun) for key in keys]
    totals = [
        card("rounds", f"{len(facts.rounds)}" + (f" of {facts.rounds_planned}" if facts.rounds_planned else "")),
        card("time of all rounds", duration(facts.total("seconds"))),
        card("sent by silos", size(facts.total("bytes_up"))),
        card("sent to silos", size(facts.total("bytes_down"))),
        card("peak memory", size(facts.peak("peak_pss")), "all processes of the run"),
        card("failures", count(len(facts.failures()))),
    ]
    small = f'<div class="cards small">{"".join(totals)}</div>' if facts.rounds else ""
    opening, _, rest = verdict(facts).partition(": ")
    told = f"<b>{e(opening)}:</b> {e(rest)}" if rest else e(opening)
    return f'<p class="verdict">{told}</p><div class="cards">{"".join(cards)}</div>{small}'


def _main_metric(groups: list[Group]) -> str | None:
    keys = metric_keys(group.row for group in groups)
    return keys[0] if keys else None


def _arm_card(group: Group, key: str) -> str:
    found = group.estimate(key)
    note = f"mean of {group.members()} " if len(group.arms) > 1 else ""
    note += _interval(key, found) if found and found.low is not None else ""
    return card(group.name, metric(key, found.value) if found else MISSING, note, main=group.key == "federated")


def first_model(facts: RunFacts) -> str:
    """What the run's first measurement is of."""
    return "model of the earlier run" if facts.run.get("start") else "base model"


def _change_card(key: str, before: Estimate | None, after: Estimate | None, rows: str, begun: str) -> str:
    if before is None or after is None:
        return card(f"{metric_name(key)}, {rows}", metric(key, (after or before or Estimate(float("nan"))).value))
    values = f"{metric(key, before.value)} → {metric(key, after.value)}"
    better = (after.value > before.value) == higher_is_better(key)
    note = "unchanged" if after.value == before.value else ("better" if better else "worse")
    return card(f"{metric_name(key)}, {rows} rows", values, f"{begun} → after training: {note}", main=True)


def _comparison(facts: RunFacts) -> str:
    groups = facts.groups()
    if not groups:
        return ""
    keys = metric_keys(group.row for group in groups)
    keys = [k for k in keys if k != "perplexity"]  # it says what the loss says
    shown = keys[:2]
    figures = [figure(plots.comparison(groups, k), metric_name(k).capitalize()) for k in shown]
    head = ["how it was trained", *[metric_name(k) for k in keys], *COSTS]
    rows, main = [], []
    for group in groups:
        values = [with_interval(k, group.estimate(k), "\n") for k in keys]
        rows.append([_group_label(group), *values, *_cost_cells(group.row.get)])
        main.append(group.key == "federated")
    each = [
        [
            arm.get("arm"),
            arm.get("seed"),
            *[with_interval(k, estimate(arm.get("metrics") or {}, k), "\n") for k in keys],
            *_cost_cells((arm.get("cost") or {}).get),
        ]
        for group in groups
        for arm in group.arms
    ]
    seeds = sorted({arm.get("seed") for group in groups for arm in group.arms}, key=str)
    return (
        "<h2>Does federating help?</h2>"
        f'<p class="note">All results are on the same held-out test rows; {e(plural(len(seeds), "seed"))}. '
        f"Whiskers and brackets are 95 % intervals over {'seeds' if len(seeds) > 1 else 'test items'}; circles are "
        "single silos. Costs are those of one arm on average; training time is summed over silos.</p>"
        f'<div class="pair">{"".join(figures)}</div>{table(head, rows, main=main)}{_differences(facts)}'
        f"<details><summary>All {len(each):,} arms</summary>"
        f"{table(['arm', 'seed', *head[1:]], each[:200])}</details>"
    )


def _differences(facts: RunFacts) -> str:
    """Paired differences, item by item: sharper than comparing two intervals by eye."""
    judged = facts.comparison.get("verdict") or {}
    key = str(judged.get("metric", ""))
    factor = 100 if is_share(key) else 1
    unit, digits = (" points", 1) if factor == 100 else ("", 3)
    rows = []
    for c in judged.get("comparisons") or []:
        low, high = (f"{factor * v:+.{digits}f}" for v in c["interval"])
        interval = f"{factor * c['difference']:+.{digits}f}{unit} [{low}, {high}]"
        rows.append([GROUPS.get(c["against"], c["against"]), interval, c["outcome"]])
    if not rows:
        return ""
    note = f"Federated minus the other in {metric_name(key)}, paired item by item, with 95 % intervals."
    head = ["federated against", "difference", "federated is"]
    return f'<h3>Differences</h3><p class="note">{e(note)}</p>{table(head, rows)}'


def _group_label(group: Group) -> str:
    return group.name + (f" (mean of {group.members()})" if len(group.arms) > 1 else "")


def _cost_cells(cost: Any) -> list[str]:
    return [
        count(cost("steps")),
        count(cost("tokens")),
        count(cost("tokens_per_second")),
        size(cost("bytes_up")),
        size(cost("bytes_down")),
        duration(cost("seconds")),
        size(cost("peak_pss")),
    ]


def _held_out(facts: RunFacts) -> str:
    before, after, role = facts.before_after()
    if not before and not after:
        return ""
    keys = metric_keys([s for s in (before, after) if s])
    rows = [[metric_name(k), with_interval(k, estimate(before, k)), with_interval(k, estimate(after, k))] for k in keys]
    head = ["all silos together", first_model(facts), "after training"]
    others: dict[str, Any] = {}
    personal = ""
    if facts.personal:
        personal = " Each silo is measured with its own model."
        if others := facts.evaluation.get("others") or {}:
            head.append("on the other silos' rows")
            rows = [[*row, with_interval(k, estimate(others, k))] for row, k in zip(rows, keys, strict=True)]
    parts = [table(head, rows)]
    examples = (after or before).get("examples")
    summed = (after or before).get("summed")
    if is_number(summed):  # and none of a silo is known
        personal += (
            f" Figures left only in the sum over {plural(int(summed), 'silo')}, so there are none of a single one."
        )
    fair = _fairness({first_model(facts): before, "after training": after, "on the other silos' rows": others}, keys)
    return (
        f"<h2>Held-out results</h2>"
        f'<p class="note">{e(role.capitalize())} rows, never trained on'
        + (f": {e(count(examples))} examples" if is_number(examples) else "")
        + f". Brackets are 95 % intervals.{personal}</p>{''.join(parts)}{fair}"
    )


def _fairness(measured: dict[str, dict[str, Any]], keys: list[str]) -> str:
    """How silos differ, by what each was measured with or on."""
    known = [k for k in keys if len(fairness(measured["after training"], k)) > 1 and k != "perplexity"]
    if not known:
        return ""
    rows = []
    for key in known:
        for label, summary in measured.items():
            values = fairness(summary, key)
            if values:
                s = spread(values.values(), key)
                worst = [n for n, v in values.items() if v == s["worst"]]
                which = worst[0] if len(worst) == 1 else plural(len(worst), "silo")
                cells = [metric(key, s["mean"]), metric(key, s["worst"]), metric(key, s["deviation"])]
                rows.append([metric_name(key), label, *cells, which])
    head = ["across silos", "model", "mean", "worst silo", "std. deviation", "which is worst"]
    return (
        "<h3>Is every silo served?</h3>"
        '<p class="note">Every silo counts the same here, however many rows it holds.</p>'
        + table(head, rows, text=2)
        + figure(plots.fairness_bars(measured, known[0]), f"{metric_name(known[0]).capitalize()} of each silo")
    )


def _learning(facts: RunFacts) -> str:
    model = "its own model" if facts.personal else "the shared model"
    figures = [
        figure(
            plots.losses(facts),
            "Loss per round",
            f"Round 0 is {first_model(facts).removeprefix('the ')} before any training.",
        ),
        figure(plots.silo_train_loss(facts), "Training loss of each silo", "Click a name in the legend to hide it."),
        figure(plots.silo_validation_loss(facts), f"Validation loss of {model} at each silo"),
    ]
    return _section("Learning", figures)


def _method(facts: RunFacts) -> str:
    """What there is to see only with some algorithms, and silos that do a part of the work."""
    figures = [
        figure(
            plots.aggregation_error(facts),
            "Aggregation error",
            "What silos load after a round against the weighted mean of the products B A they trained, in Frobenius "
            "norm over all layers. An exact method is below 1e-5: what is left is rounding.",
        ),
        figure(
            plots.merged(facts),
            "What is merged beside the frozen weights",
            "Kept in fp32, in every silo's memory too; `recompress` limits it.",
        ),
        figure(
            plots.staleness(facts),
            "Staleness of the answers",
            "The recipe's `staleness` says how much an answer counts that comes so late.",
        ),
    ]
    cards = facts.data.get("silos") or {}
    plans = [(name, card["plan"]) for name, card in sorted(cards.items()) if card.get("plan")]
    words = [[name, ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in plan.items())] for name, plan in plans[:ROWS]]
    more = f'<p class="note">… and {len(plans) - ROWS:,} more in data.json.</p>' if len(plans) > ROWS else ""
    mixed = f"<h2>What each silo does</h2>{table(['silo', 'its plan'], words, text=2)}{more}" if plans else ""
    return _section("How updates became one model", figures) + mixed


def _data(facts: RunFacts) -> str:
    cards = facts.data.get("silos") or {}
    if cards and rows_kept(facts):  # their cards say 1 row, for any number
        return f"<h2>Who holds what</h2><p>{e(ROWS_KEPT)}</p>"
    totals = {
        role: sum((c.get("rows") or {}).get(role, 0) for c in cards.values())
        for role in ("train", "validation", "test")
    }
    skipped = {k: v for k, v in (facts.run.get("skipped") or {}).items() if v}
    note = ", ".join(f"{count(n)} {role} rows" for role, n in totals.items() if n)
    if note and masked(facts):
        note = f"at most {note}: each silo rounds its number up to a power of two"
    if skipped:
        note += "; left out: " + ", ".join(f"{count(n)} {str(why).replace('_', ' ')}" for why, n in skipped.items())
    by_label = " by label" if any(card.get("labels") for card in cards.values()) else ""
    return _section("Who holds what", [figure(plots.holdings(facts), f"Rows of each silo{by_label}", note)])


def _cost(facts: RunFacts) -> str:
    figures = [
        figure(plots.traffic(facts), "Bytes on the wire, cumulative"),
        figure(plots.seconds(facts), "Seconds per round", "Silos train side by side, so a round isn't their sum."),
        figure(plots.memory(facts), "Peak memory"),
        figure(plots.speed(facts), "Training speed of each silo"),
        figure(plots.flops(facts), "Model FLOPs of each silo (6 N + 12 L H Q T a token; 4 N where weights are frozen)"),
        figure(plots.utilisation(facts), "Model FLOPs as a share of the devices' peak (MFU)"),
    ]
    return _section("What it cost", figures)


def _section(title: str, figures: list[str]) -> str:
    drawn = [f for f in figures if f]
    if not drawn:
        return ""
    wide = [] if len(drawn) % 2 == 0 else [drawn.pop(0)]
    return f'<h2>{e(title)}</h2>{"".join(wide)}<div class="pair">{"".join(drawn)}</div>'


def _failures(facts: RunFacts) -> str:
    found = facts.failures()
    if not found:
        return ""
    rows = [
        [
            int(f.get("round") or 0) + 1 or "start",
            f.get("silo", "?"),
            str(f.get("kind", "")).replace("_", " "),
            f.get("reason", ""),
        ]
        for f in found[:ROWS]
    ]
    more = f'<p class="note">… and {len(found) - ROWS:,} more in rounds.jsonl.</p>' if len(found) > ROWS else ""
    return f"<h2>Failures</h2>{table(['round', 'silo', 'what', 'reason'], rows, text=4)}{more}"


def _reproduce(facts: RunFacts) -> str:
    versions = {"fedlm": facts.run.get("fedlm", "?"), **(facts.run.get("versions") or {})}
    command = "fedlm compare recipe.yaml" if facts.comparison else "fedlm run recipe.yaml"
    rows = [[name, version] for name, version in versions.items()]
    recipe = f"<details><summary>recipe.yaml, as resolved</summary><pre>{e(facts.recipe_text)}</pre></details>"
    return (
        "<h2>Reproduce</h2><p>Save the recipe below as recipe.yaml, then:</p>"
        f"<pre>pip install fedlm=={e(versions['fedlm'])}\n{e(command)}</pre>{recipe if facts.recipe_text else ''}"
        f"<details><summary>Versions</summary>{table(['package', 'version'], rows, text=2)}</details>"
    )
