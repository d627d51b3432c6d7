"""Membership inference and extraction on the final model of a run, beside a model that knows a few rows by heart.

Members are rows that silos trained on, others are held out from the same source; where the split is by a hash of each
row, nothing but training tells them apart. The open configuration is the run's own adapter after a short over-fit on a
few of the members (`fedlm.attacks.by_heart`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import fisher_exact, hypergeom

from fedlm.attacks.by_heart import learn_by_heart
from fedlm.attacks.extraction import extract
from fedlm.attacks.membership import Vector, calibrated_scores, judge, loss_scores, losses, threshold
from fedlm.attacks.rows import OTHER_SOURCE, draws_are_known, held_out, other_sources, some, trained_on
from fedlm.attacks.trial import LEVEL, Trial
from fedlm.data.federated import FederatedData
from fedlm.errors import PrivacyError
from fedlm.federation.silo.workbench import Workbench
from fedlm.federation.start import begun, whole_model
from fedlm.messages import Observe, Tensors
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS
from fedlm.training.forward import precision
from fedlm.training.sequences import Encoded

ROWS = 200
"""Members, and others, that are asked about where there are so many."""
FEWEST = 10
"""Below so many of either, nothing is said."""
BY_HEART = 8
"""Rows that the open configuration knows by heart."""
PREFIX, SUFFIXES = 16, (16, 8)
"""Tokens of a row that are shown, at least, and that are to be written: the first number for which half of the rows on
either side are long enough."""
FPR = 0.01


def not_covered(recipe: Recipe) -> str | None:
    """Why there is no likelihood of rows to be looked at; None where there is."""
    if recipe.search is not None or recipe.in_context is not None:
        return "nothing is trained"
    facts = TASKS[recipe.task]
    if facts.head != "none" or not facts.likelihood:
        return f"task '{recipe.task}' does not learn to write rows, and this attack asks how likely a model finds them"
    return None


@dataclass(frozen=True)
class _Asked:
    """What is known of a model: losses of members and others, and the same of the model that training began with."""

    members: Sequence[Encoded]
    others: Sequence[Encoded]
    before: tuple[Vector, Vector]
    after: tuple[Vector, Vector]


def model_trials(
    recipe: Recipe,
    data: FederatedData,
    tensors: Tensors,
    start: Tensors,
    rounds: Mapping[str, Sequence[int]],
    *,
    attacks: Collection[str] = ("membership", "extraction"),
    rows: int = ROWS,
    seed: int = 0,
    observe: Observe | None = None,
) -> tuple[list[Trial], dict[str, str]]:
    """The trials, open configurations first, and by attack why it was not tried.

    Args:
        tensors: the final model, whole (as `fedlm.models.adapters.completed` gives it).
        start: what the run started from, see `fedlm.federation.start.held_start`.
        rounds: by silo, those in which its update was used.
        rows: members, and others, at most.

    Raises:
        PrivacyError: these attacks do not cover the recipe's task, or there are too few rows of either side.
        FedlmError: the model or the rows cannot be loaded.
    """
    if (why := not_covered(recipe)) is not None:
        raise PrivacyError(why)
    tell = observe or (lambda _: None)
    tell({"kind": "phase", "text": "loading the model and the rows"})
    bench = Workbench(recipe, data)
    bench.load()
    own = bench.begin_from(whole_model(tensors, start))
    bench.put(begun(recipe, start), whole=True)
    members, pool = trained_on(bench, rounds, rows, seed)
    others = held_out(bench, sorted(rounds), rows, seed)
    for part, what, fix in (
        (members, "rows that were trained on are", "attack a run that trained on more"),
        (others, "held-out rows are", "hold out more: data.split"),
    ):
        if len(part) < FEWEST:
            raise PrivacyError(f"only {len(part)} {what} here, and below {FEWEST} nothing can be said", fix=fix)

    limit, packing = recipe.evaluation.batch_tokens, recipe.training.packing

    def of(*parts: Sequence[Encoded]) -> tuple[Vector, Vector]:
        one, other = (losses(bench.model, part, limit, packing=packing) for part in parts)
        return one, other

    tell({"kind": "phase", "text": f"losses of {len(members)} members and {len(others)} others before training"})
    before = of(members, others)
    note = _limits(recipe, pool, len(members), len(others))
    trials: list[Trial] = []
    left_out: dict[str, str] = {}

    def attack(words: str, asked: _Asked, *, is_open: bool) -> None:
        if "membership" in attacks:
            trials.extend(_membership(words, asked, is_open, note))
        if "extraction" in attacks:
            tell({"kind": "phase", "text": f"prompting with {len(asked.members) + len(asked.others)} beginnings"})
            try:
                trials.append(_extraction(words, bench, asked, is_open, note))
            except PrivacyError as error:
                left_out["extraction"] = error.what

    bench.put(own, whole=True)
    bench.model.eval()
    tell({"kind": "phase", "text": "losses under the final model"})
    attack("the final model", _Asked(members, others, before, of(members, others)), is_open=False)

    few = some(members, BY_HEART, seed, "by heart")
    place = {id(row): i for i, row in enumerate(members)}
    tell({"kind": "phase", "text": f"learning {len(few)} rows by heart"})
    loss = learn_by_heart(bench, own, few, seed, observe)
    known = (before[0][[place[id(row)] for row in few]], before[1])
    words = f"made to know {len(few)} of these rows by heart (training loss {loss:.2g})"
    attack(words, _Asked(few, others, known, of(few, others)), is_open=True)
    if "extraction" in left_out:
        trials = [t for t in trials if t.attack != "extraction"]
    return sorted(trials, key=lambda t: (t.attack != "membership", not t.open)), left_out


def _limits(recipe: Recipe, pool: int, members: int, others: int) -> str:
    """What the figures do not say."""
    told = []
    if ALGORITHMS[recipe.federation.algorithm.name].personal:
        told.append("the model is the part that silos share")
    if min(members, others) < ROWS:
        told.append(f"fewer rows than the {ROWS} of a full audit")
    if not draws_are_known(recipe):
        told.append("members are all rows of the silos, though some may not have been drawn")
    if other_sources(recipe):
        told.append(OTHER_SOURCE)
    if members < pool:
        told.append(f"members are {members} of {pool}")
    return "; ".join(told)


def _membership(words: str, asked: _Asked, is_open: bool, note: str) -> list[Trial]:
    counts = {"members": len(asked.members), "others": len(asked.others)}
    plain = tuple(loss_scores(values) for values in asked.after)
    calibrated = tuple(calibrated_scores(a, b) for a, b in zip(asked.after, asked.before, strict=True))
    found = []
    for name, (inside, outside) in (("loss", plain), ("loss against the starting model", calibrated)):
        outcome = judge(inside, outside, fpr=FPR)
        found.append(
            Trial(
                "membership",
                words,
                f"AUC by {name}",
                outcome.auc,
                outcome.auc_interval,
                0.5,
                outcome.auc_interval[0] > 0.5,
                counts,
                open=is_open,
                note=note,
            )
        )
    hits = round(outcome.tpr * outcome.members)
    found.append(
        Trial(
            "membership",
            words,
            f"members found at {FPR:.0%} false ones, against the starting model",
            outcome.tpr,
            outcome.tpr_interval,
            FPR,
            hits_by_chance(hits, inside, outside) < LEVEL,
            counts,
            open=is_open,
            note=note,
        )
    )
    return found


def hits_by_chance(hits: int, inside: Vector, outside: Vector) -> float:
    """The probability that so many members or more are above the threshold of `judge` if scores tell nothing: that of
    all rows' highest ones no more are others than the threshold allows (hypergeometric)."""
    if hits == 0:
        return 1.0
    wrong = int((outside > threshold(outside, FPR)).sum())
    return float(hypergeom.cdf(wrong, len(inside) + len(outside), len(outside), hits + wrong))


def _extraction(words: str, bench: Workbench, asked: _Asked, is_open: bool, note: str) -> Trial:
    """Raises PrivacyError: rows are too short."""
    suffix = next((s for s in SUFFIXES if all(_long(part, s) for part in (asked.members, asked.others))), None)
    if suffix is None:
        raise PrivacyError(
            f"most rows have fewer than {SUFFIXES[-1]} tokens after what a prompt shows, too few to write verbatim"
        )
    with precision(bench.model):
        inside, outside = (
            extract(
                bench.model,
                bench.tokenizer,
                [row.ids.tolist() for row in part],
                prefix=[_prefix(row) for row in part],
                suffix=suffix,
                batch_tokens=bench.recipe.evaluation.batch_tokens,
            )
            for part in (asked.members, asked.others)
        )
    table = [[inside.verbatim, inside.texts - inside.verbatim], [outside.verbatim, outside.texts - outside.verbatim]]
    return Trial(
        "extraction",
        words,
        "rows continued verbatim",
        inside.share,
        inside.interval,
        outside.share,
        float(fisher_exact(table, alternative="greater").pvalue) < LEVEL,
        {"members": inside.texts, "others": outside.texts, "tokens": suffix},
        open=is_open,
        note=note,
    )


def _prefix(row: Encoded) -> int:
    """A prompt is shown up to where the row's targets begin: what is no target is not learnt."""
    return max(PREFIX, int(np.argmax(row.loss)))


def _long(rows: Sequence[Encoded], suffix: int) -> bool:
    return 2 * sum(len(row) >= _prefix(row) + suffix for row in rows) >= len(rows)
