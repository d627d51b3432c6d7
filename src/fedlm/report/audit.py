"""What a data-protection officer asks of a run: what leaves a silo, what protects it, what that costs, whom to trust.

Everything follows from the recipe, and for a run from its directory: what it says it did, and its ledgers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fedlm.attacks.trial import FILE as ATTACKS_FILE
from fedlm.attacks.trial import Tried, read_tried
from fedlm.errors import PrivacyError, RunError
from fedlm.federation.noise import adaptive_of, mechanism_of
from fedlm.federation.silo.private import LEDGER, cost
from fedlm.federation.silo.token_ledger import FILE as TOKENS
from fedlm.federation.silo.token_ledger import tokens_spent
from fedlm.files import write_atomic
from fedlm.privacy.ledger import read_spent
from fedlm.privacy.mechanisms import describe
from fedlm.recipe.guards import mask_of
from fedlm.recipe.load import load_recipe, recipe_hash
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.privacy import by_user, noised_by_silos, noised_in_training, withheld
from fedlm.recipe.prompting import drawn_anew, frozen
from fedlm.recipe.schema import Recipe
from fedlm.report.facts import RunFacts, read_run
from fedlm.report.format import count, size
from fedlm.report.markup import card, document, e, table
from fedlm.report.tried import section
from fedlm.report.trust import open_ends, trusted

PAGE = "audit.html"

PLURAL = {"example": "rows", "user": "users", "silo": "silos"}
"""What is protected, by the unit's name."""

OPEN = "in the open, to the coordinator"
MASKED = "only in the sum over the round's silos (secure aggregation)"
NOISED = "with noise that the silo added itself (differential privacy)"
CLIPPED = "clipped, to the coordinator, which adds noise to the sum (differential privacy)"
KEPT = "does not leave"


@dataclass(frozen=True)
class Leaving:
    """One kind of thing that a silo sends, or would."""

    what: str
    when: str
    protection: str


@dataclass(frozen=True)
class Guarantee:
    """A budget, and what is spent of it."""

    unit: str
    epsilon: float
    delta: float
    mechanism: str
    spent: dict[str, float] = field(default_factory=dict)
    """By silo, or of 'every silo'."""
    protected: dict[str, int] = field(default_factory=dict)
    """By silo, how many rows or users there are, each of which is protected; of 'every silo', how many silos."""
    by_ledger: bool = False
    """As a ledger in the run directory has it, not as the recipe implies."""

    @property
    def counted(self) -> str:
        """What the units are called."""
        return PLURAL[self.unit]


@dataclass(frozen=True)
class AuditOfRun:
    """The answers; `rounds` is None where there is only a recipe."""

    name: str
    recipe: Recipe
    leaving: tuple[Leaving, ...]
    guarantee: Guarantee | None
    trusted: tuple[tuple[str, str], ...]
    open_ends: tuple[str, ...]
    rounds: int | None = None
    sent: dict[str, float] = field(default_factory=dict)
    """Bytes that each silo sent in training, over all rounds."""
    tokens: dict[str, float] = field(default_factory=dict)
    """By silo whose ledger of noise on text is in the run directory: epsilon that a token has spent, of all draws."""
    tried: Tried = field(default_factory=lambda: Tried(""))
    """Attacks, and what came of them."""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "rounds": self.rounds,
            "leaving": [asdict(item) for item in self.leaving],
            "guarantee": None if self.guarantee is None else asdict(self.guarantee),
            "trusted": [{"who": who, "with": what} for who, what in self.trusted],
            "not_protected": list(self.open_ends),
            "token_epsilon_spent": self.tokens,
            "bytes_sent": self.sent,
            "attacks": self.tried.as_json(),
        }


def audit_of(path: Path, attacks: Path | None = None) -> AuditOfRun:
    """Of a run directory, or of a recipe file that was not run yet.

    Args:
        attacks: what `fedlm audit attack` wrote of it; by default the run directory's own.

    Raises:
        FedlmError: it is neither, a ledger is damaged, or attacks were tried on another recipe.
    """
    facts = read_run(path, untrained=True) if path.is_dir() else None
    recipe = load_recipe(path / "recipe.yaml" if facts else path, ())
    if attacks is not None and not attacks.is_file():
        raise RunError(
            "there is no such file", where=str(attacks), fix="`fedlm audit attack RECIPE --out FILE` writes it"
        )
    if attacks is None and facts is not None:
        attacks = path / ATTACKS_FILE
    tried = Tried("") if attacks is None else read_tried(attacks, recipe_hash(recipe))
    name = recipe.name if facts is None else facts.name
    return replace(_answers(name, recipe, facts, path if facts else None), tried=tried)


def _answers(name: str, recipe: Recipe, facts: RunFacts | None, folder: Path | None) -> AuditOfRun:
    sent: dict[str, float] = {}
    rounds = None
    if facts is not None:
        rounds = len(facts.rounds)
        for line in [] if frozen(recipe) else facts.rounds:  # without training bytes are not counted by silo
            for silo, figures in (line.get("silos") or {}).items():
                sent[silo] = sent.get(silo, 0.0) + float(figures.get("bytes_up") or 0)
    return AuditOfRun(
        name,
        recipe,
        tuple(leaving(recipe)),
        _guarantee(recipe, facts, folder),
        tuple(trusted(recipe)),
        tuple(open_ends(recipe)),
        rounds,
        sent,
        _tokens(folder),
    )


def _tokens(folder: Path | None) -> dict[str, float]:
    silos = [] if folder is None else [file.parent for file in sorted((folder / "silos").glob(f"*/{TOKENS}"))]
    return {silo.name: told.epsilon for silo in silos if (told := tokens_spent(silo)) is not None}


# ---------------------------------------------------------------- what leaves


def leaving(recipe: Recipe) -> Iterator[Leaving]:
    """Everything that a silo sends in a run of this recipe, and what it keeps that others would send."""
    masked, hidden = mask_of(recipe) is not None, withheld(recipe)
    spec = recipe.privacy
    yield Leaving("versions of fedlm, torch and Python", "once", OPEN)
    rows = "how many rows it trains on"
    if by_user(recipe):
        yield Leaving(
            "of how many users it has rows", "once", f"rounded up to a power of two, {OPEN}" if masked else OPEN
        )
    if hidden and spec is not None and spec.unit != "example":
        yield Leaving("whether it has rows to train on", "once", OPEN)
        yield Leaving(rows, "once", KEPT)
    elif masked:
        yield Leaving(rows, "once", f"rounded up to a power of two, {OPEN}")
    else:
        yield Leaving(rows, "once", OPEN)
    held = f"rounded up to a power of two, {OPEN}" if masked else OPEN
    yield Leaving("how many rows it holds out", "once", KEPT if hidden else held)
    labels = f"{OPEN}; not where its policy has `share_labels: false`"
    yield Leaving("rows by label", "once", KEPT if hidden or masked or drawn_anew(recipe) else labels)
    if by_user(recipe):
        yield Leaving("whose a row is", "never", KEPT)

    if recipe.search is not None:
        yield Leaving("sums of its rows' scores of candidate prompts", "every round", OPEN)
    if recipe.in_context is not None:
        epsilon = recipe.in_context.token_epsilon
        noise = "" if epsilon is None else f"of rows whose tokens were drawn anew (epsilon {epsilon:g} a token), "
        yield Leaving("log-probabilities of each question's choices, with rows in context", "every round", noise + OPEN)
    if recipe.search is None and recipe.in_context is None:
        yield from _of_training(recipe)
    yield Leaving("when it answers, and the size of what it sends", "every exchange", "seen by whoever carries it")
    yield Leaving("text, tokens, or any row", "never", KEPT)


def _of_training(recipe: Recipe) -> Iterator[Leaving]:
    masked, hidden = mask_of(recipe) is not None, withheld(recipe)
    spec, method = recipe.privacy, ALGORITHMS[recipe.federation.algorithm.name]
    update = "an update of the adapter" if recipe.adapter.kind != "full" else "an update of the model"
    protections = [OPEN]
    if spec is not None:
        protections = [NOISED if noised_in_training(recipe) or masked else CLIPPED]
    if masked:
        protections = [*([] if spec is None else protections), MASKED]
    smaller = [guard.name for guard in recipe.guards if guard.name != "mask"]
    note = f" (made smaller by {' and '.join(smaller)}, which protects nothing)" if smaller else ""
    yield Leaving(update, "every round", ", and ".join(protections) + note)
    if spec is not None and spec.adaptive is not None:
        counted = "as it is, to the coordinator, which adds noise to their count (differential privacy)"
        if masked:
            counted = f"{NOISED}, and {MASKED}"
        yield Leaving("a bit: whether its update was within the clip", "every round", counted)
    if method.silo_state:
        yield Leaving("what the algorithm keeps in a silo between rounds", "", KEPT)
    if method.losses:
        yield Leaving("losses of candidates on its rows, which the algorithm compares", "every round", OPEN)
    if method.setup_rounds:
        yield Leaving("a sketch of the first gradient on its rows", "round 0", OPEN)

    if hidden or noised_by_silos(recipe):
        figures = KEPT
    elif masked:
        figures = f"its loss {MASKED}, others do not leave"
    else:
        figures = OPEN
    yield Leaving("figures of its training: loss, tokens, times, memory", "every round", figures)
    held_out = KEPT if hidden else f"sums and counts over its held-out rows, {MASKED if masked else OPEN}"
    yield Leaving("figures of the model on rows that it holds out", f"every {_nth(recipe.evaluation.every)}", held_out)
    if recipe.data.selection is not None and recipe.data.selection.method == "fedhds":
        yield Leaving("centres of groups of its rows", "once", OPEN)
    if recipe.data.augment is not None:
        yield Leaving("centres of groups of its rows", "once", OPEN)


def _nth(every: int) -> str:
    return "round" if every == 1 else f"{every}th round"


# ---------------------------------------------------------------- what it costs


def _guarantee(recipe: Recipe, facts: RunFacts | None, folder: Path | None) -> Guarantee | None:
    spec = recipe.privacy
    if spec is None:
        return None
    cards = (facts.data if facts else {}).get("silos") or {}
    rows = {name: int(card.get("users", card["rows"]["train"])) for name, card in sorted(cards.items())}
    rows = {name: number for name, number in rows.items() if number > 0}
    whole = {"every silo": len(rows)} if rows else {}
    found: dict[str, float] = {}
    ledgers = False
    if noised_by_silos(recipe):
        words = f"{spec.noise} of each silo's own, sized for the fewest that must be in a sum and keep it to themselves"
        if spec.adaptive is not None:
            words += "; on updates and the count of those within the clip together"
        ledgers_of = sorted((folder / "silos").glob(f"*/*/{LEDGER}")) if folder is not None else []
        if ledgers_of:
            found, ledgers = {file.parts[-3]: read_spent(file)[1].epsilon for file in ledgers_of}, True
        elif facts is not None and facts.rounds:
            found = {"every silo": float(facts.rounds[-1].get("epsilon") or 0.0)}
        return Guarantee(spec.unit, spec.epsilon, spec.delta, words, found, whole, ledgers)
    if spec.unit == "silo":
        words = _noise_on_sums(recipe, len(rows)) if rows else "noise follows from the number of silos"
        if folder is not None and (folder / LEDGER).is_file():
            found, ledgers = {"every silo": read_spent(folder / LEDGER)[1].epsilon}, True
        return Guarantee(spec.unit, spec.epsilon, spec.delta, words, found, whole, ledgers)
    words = f"noise follows from each silo's number of {PLURAL[spec.unit]}"
    for silo, number in rows.items():
        assert facts is not None and folder is not None
        trained = [line for line in facts.rounds if silo in (line.get("sampled") or [])]
        ledger = folder / "silos" / silo / str(facts.run.get("run")) / LEDGER
        if ledger.is_file():
            budget, spent = read_spent(ledger)
            found[silo], ledgers = spent.epsilon, True
            rows[silo] = budget.units.get(silo, number)  # a card's may be rounded
            continue
        try:
            mine = cost(recipe, silo, number)
        except PrivacyError:  # such a silo refuses at the greeting
            continue
        found[silo] = mine.epsilon(len(trained))
    if rows:
        smallest = min(rows, key=rows.__getitem__)
        noise = cost(recipe, smallest, rows[smallest]).words()
        words = f"{noise} ('{smallest}', the smallest silo, of {rows[smallest]} {PLURAL[spec.unit]})"
    return Guarantee(spec.unit, spec.epsilon, spec.delta, words, found, rows, ledgers)


def _noise_on_sums(recipe: Recipe, silos: int) -> str:
    mechanism, adaptive = mechanism_of(recipe, silos), adaptive_of(recipe, silos)
    if adaptive is None or mechanism.noise_multiplier is None:
        return describe(mechanism)
    on_sum = adaptive.update_noise(mechanism.noise_multiplier)
    return (
        f"{describe(mechanism)}, as {on_sum:.4g} on the sum of updates and {adaptive.count_noise:.4g} on the count of "
        "those within the clip cost together"
    )


def spending(guarantee: Guarantee) -> list[list[str]]:
    """A line for each silo, or for every silo: how many units are protected, what is spent, and the budget."""
    return [
        [silo, str(guarantee.protected.get(silo, "")), f"{spent:.4g}", f"{guarantee.epsilon:g}"]
        for silo, spent in guarantee.spent.items()
    ]


TOKEN_HEAD = "epsilon a token, by the silo's ledger"
TOKEN_SUM = "Epsilons of different draws of a silo's rows add up; the same draw costs once. It is no epsilon of a row."


def spent_by_token(found: AuditOfRun) -> list[list[str]]:
    """A line for each silo with a ledger of noise on text."""
    return [[silo, f"{epsilon:.4g}"] for silo, epsilon in found.tokens.items()]


def meaning(guarantee: Guarantee) -> str:
    """The guarantee in a sentence."""
    whose = {
        "example": "one row of a silo: what it contributes to the training",
        "user": "all rows of one person in one silo: what they contribute to the training together",
        "silo": "one whole organisation: what all its rows contribute to the models",
    }[guarantee.unit]
    factor = math.exp(guarantee.epsilon)
    shown = f"{factor:,.0f}" if 10 <= factor < 1e6 else f"{factor:.3g}"
    return (
        f"Protected is {whose}. Nobody who sees what is released can tell by more than a factor of "
        f"e^{guarantee.epsilon:g} = {shown} in the odds whether that contribution was there, "
        f"except with a probability of {guarantee.delta:g}."
    )


# ---------------------------------------------------------------- the page


def write_audit(run_dir: Path, found: AuditOfRun) -> Path:
    """The page, beside the run's report."""
    page = run_dir / PAGE
    write_atomic(page, html_page(found).encode())
    return page


def html_page(found: AuditOfRun) -> str:
    guarantee = found.guarantee
    cards = [card("rounds", "not run yet" if found.rounds is None else count(found.rounds))]
    if guarantee is not None:
        most = max(guarantee.spent.values(), default=None)
        spent = "nothing yet" if most is None else f"{most:.3g} spent"
        cards.append(card("epsilon", f"{guarantee.epsilon:g}", f"at delta {guarantee.delta:g}; {spent}", main=True))
    if found.sent:
        cards.append(card("sent by a silo", size(max(found.sent.values())), "at most, in training"))
    body = [
        f"<header><h1>{e(found.name)} <span class='badge finished'>audit</span></h1>",
        f'<p class="lead">{e(sentence(found))}</p></header><div class="cards">{"".join(cards)}</div>',
        "<h2>What leaves a silo</h2>",
        table(["what", "when", "how"], [[i.what, i.when, i.protection] for i in found.leaving], text=3),
    ]
    if guarantee is not None:
        body += [f"<h2>The guarantee</h2><p>{e(meaning(guarantee))}</p>", f"<p>Noise: {e(guarantee.mechanism)}.</p>"]
        if guarantee.spent:
            source = "the ledger" if guarantee.by_ledger else "the recipe and the rounds that were run"
            body.append(
                table(["whose rows", guarantee.counted, f"epsilon spent, by {source}", "budget"], spending(guarantee))
            )
    if found.tokens:
        body += [f"<h2>Noise on text</h2><p>{e(TOKEN_SUM)}</p>", table(["silo", TOKEN_HEAD], spent_by_token(found))]
    body.append("<h2>Who is trusted with what</h2>" + table(["who", "with"], found.trusted, text=2))
    body.append("<h2>What is not protected</h2><ul>" + _listed(found.open_ends) + "</ul>")
    body.append(section(found.tried))
    if found.sent:
        body.append("<h2>Bytes</h2>" + table(["silo", "sent in training"], _sizes(found.sent)))
    return document(f"{found.name} · fedlm audit", "".join(body))


def sentence(found: AuditOfRun) -> str:
    """The run's protection in one sentence."""
    masks = "updates are seen only in sums" if mask_of(found.recipe) is not None else ""
    noise = ""
    if found.guarantee is not None:
        unit = {
            "example": "each row",
            "user": "each user, with all rows in a silo,",
            "silo": "each organisation",
        }[found.guarantee.unit]
        noise = f"{unit} is protected with epsilon {found.guarantee.epsilon:g} at delta {found.guarantee.delta:g}"
    told = " and ".join(part for part in (masks, noise) if part)
    if drawn_anew(found.recipe):
        return "Each token of a row is drawn anew before the model sees it; what is guaranteed holds for a token."
    if not told and frozen(found.recipe):
        return "Nothing protects figures: the coordinator is trusted with each silo's."
    if not told:
        return "Nothing protects updates: the coordinator is trusted with each silo's, and users with the model."
    return told[0].upper() + told[1:] + "."


def _listed(lines: Iterable[str]) -> str:
    return "".join(f"<li>{e(line)}</li>" for line in lines)


def _sizes(sent: Mapping[str, float]) -> list[list[str]]:
    return [[silo, size(value)] for silo, value in sorted(sent.items())]
