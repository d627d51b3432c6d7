"""Canaries in a simulated copy of a run: how well planted secrets are remembered, and which epsilon that refutes.

Each canary is a row of its own in one silo, with a question that no other row has and three random digits; it is
planted with probability 1/2. After the copy has been trained, the losses of all of them, before and after, tell which
were planted (`fedlm.privacy.one_run`), and the digits' rank among all thousand how well they are known. The open
configuration is the copy's adapter after a short over-fit on the canaries that were planted.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from fedlm.attacks.by_heart import learn_by_heart
from fedlm.attacks.canaries import Space, coins, empirical_epsilon, exposures
from fedlm.attacks.final_model import not_covered
from fedlm.attacks.membership import Vector, losses
from fedlm.attacks.trial import LEVEL, Trial
from fedlm.data.examples import content_hash
from fedlm.data.federated import FederatedData
from fedlm.errors import PrivacyError
from fedlm.federation import coordinator
from fedlm.federation.api import new_run, using
from fedlm.federation.engines.local import LocalEngine
from fedlm.federation.silo.workbench import Workbench
from fedlm.federation.start import begun, held_start, whole_model
from fedlm.messages import Observe, Tensors
from fedlm.models.export import load_adapter
from fedlm.privacy.one_run import Audit, simultaneous
from fedlm.randomness import numpy_generator
from fedlm.recipe.privacy import IN_TRAINING, by_user
from fedlm.recipe.schema import Recipe
from fedlm.training.encode import encode_all
from fedlm.training.sequences import Encoded

DIGITS = 3
EXPOSED = 8
"""Canaries that were planted, and others, whose exposure is measured: each takes the losses of a thousand rows."""
DELTA = 1e-5
"""Of the empirical epsilon where the recipe has none."""
SHARES = (0.1, 0.25, 0.5, 1.0)
"""Of the canaries that are guessed."""


def canary_trials(
    recipe: Recipe,
    data: FederatedData,
    base: Path,
    *,
    canaries: int,
    seed: int = 0,
    observe: Observe | None = None,
) -> list[Trial]:
    """Train a copy of the run with canaries in it, and look for them; the open configuration comes first.

    Args:
        base: the folder that relative paths of the recipe start from.
        canaries: how many, about half of which are planted.

    Raises:
        PrivacyError: the attack does not cover the recipe's task or rows, or there are too few canaries.
        FedlmError: the copy cannot be trained.
    """
    if (why := not_covered(recipe)) is not None:
        raise PrivacyError(why)
    if data.kind not in ("text", "messages", "choice"):
        raise PrivacyError(f"no canary can be made of rows of {data.kind}")
    tell = observe or (lambda _: None)
    included = coins(canaries, seed)
    forms = [Space(f"The code of safe number {i} is {{}}", length=DIGITS) for i in range(canaries)]
    draw = numpy_generator(seed, "canaries' secrets")
    secrets = [f"{draw.integers(10**DIGITS):0{DIGITS}d}" for _ in forms]
    rows = [
        canary_row(data.kind, form.text(secret), users=by_user(recipe))
        for form, secret in zip(forms, secrets, strict=True)
    ]
    dealt = {
        silo: [rows[i] for i in range(n, canaries, len(data.names)) if included[i]] for n, silo in enumerate(data.names)
    }
    tell({"kind": "phase", "text": f"training a copy of the run with {included.sum()} canaries"})
    copy = data.with_training_rows(dealt)
    tensors, start = _trained(recipe, copy, base, observe)

    bench = Workbench(recipe, copy)
    bench.load()
    own = bench.begin_from(whole_model(tensors, start))
    tokens = canary_tokens(bench, rows)
    if len(tokens) != canaries:
        raise PrivacyError(f"{canaries - len(tokens)} canaries keep no token to learn", fix="raise training.max_length")
    bench.put(begun(recipe, start), whole=True)
    before = summed_losses(bench, tokens)
    spec = recipe.privacy
    by_row = spec is None or spec.unit in IN_TRAINING  # a canary is a row, and a user with one row
    words = f"a copy of the run with {included.sum()} of {canaries} canaries planted"
    words += "" if spec is None else f" (budget: epsilon {spec.epsilon:g} at delta {spec.delta:g})"

    def attack(words: str, *, is_open: bool) -> list[Trial]:
        tell({"kind": "phase", "text": "looking for canaries"})
        delta = DELTA if spec is None else spec.delta
        budget = None if spec is None or is_open else spec.epsilon
        scores = before - summed_losses(bench, tokens)
        found = [_epsilon(words, scores, included, delta, budget, is_open)] if by_row else []
        return [*found, _exposure(words, bench, forms, secrets, included, is_open)]

    bench.put(own, whole=True)
    bench.model.eval()
    trials = attack(words, is_open=False)
    tell({"kind": "phase", "text": f"learning {included.sum()} canaries by heart"})
    loss = learn_by_heart(bench, own, [r for r, there in zip(tokens, included, strict=True) if there], seed, observe)
    return [*attack(f"made to know the planted ones by heart (training loss {loss:.2g})", is_open=True), *trials]


def canary_row(kind: str, text: str, *, users: bool) -> dict[str, Any]:
    """A canonical row (see `fedlm.data.examples`) that says this, the secret being what is to be answered."""
    question, secret = text[: -DIGITS - 1], text[-DIGITS:]
    forms: dict[str, dict[str, Any]] = {
        "text": {"text": text},
        "messages": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": secret}]},
        "choice": {"question": question, "choices": [secret], "answer": 0},
    }
    row = forms[kind]
    row["hash"] = content_hash(row)
    if kind == "messages":
        row["answers"] = []
    # Each canary is a user by itself where users are protected; elsewhere no row says whose it is.
    user = row["hash"] if users else ""
    return {**row, "label": "", "domain": "canaries", "group": "", "row": "canary", "user": user}


def _trained(recipe: Recipe, data: FederatedData, base: Path, observe: Observe | None) -> tuple[Tensors, Tensors]:
    """The final model of a run over these rows, and what it started from; nothing is left on disk."""
    with tempfile.TemporaryDirectory(prefix="fedlm-attack-") as scratch:
        directory = new_run(recipe, Path(scratch) / "run", base=base)
        with using(directory):
            engine = LocalEngine(recipe, data, directory.path, observe=observe, base=base)
            try:
                coordinator.run(recipe, engine, directory, observe=observe, final_test=False)
            finally:
                engine.close()
            tensors = {n: t.clone() for n, t in load_adapter(directory.adapter, recipe.adapter).items()}
            return tensors, {n: t.clone() for n, t in held_start(directory, recipe).items()}


def canary_tokens(bench: Workbench, rows: Sequence[dict[str, Any]]) -> list[Encoded]:
    """Of each canary that keeps a token to learn, its sequence."""
    tokens = encode_all(rows, bench.task, bench.tokenizer, bench.recipe.training.max_length, skip=True)
    return [example.sequences[0] for example in tokens]


def summed_losses(bench: Workbench, rows: Sequence[Encoded]) -> Vector:
    """Negative log-likelihood (nats) of each row's targets together."""
    limit, packing = bench.recipe.evaluation.batch_tokens, bench.recipe.training.packing
    return losses(bench.model, rows, limit, packing=packing) * [row.targets for row in rows]


def _epsilon(
    words: str, scores: Vector, included: NDArray[np.bool_], delta: float, budget: float | None, is_open: bool
) -> Trial:
    found = empirical_epsilon(scores, included, delta, shares=SHARES)
    guesses = [2 * max(1, round(share * len(included) / 2)) for share in SHARES]
    most = max(
        simultaneous([Audit(len(included), min(g, len(included)), min(g, len(included))) for g in guesses], delta)
    )
    note = f"{found.canaries} canaries can refute an epsilon of {most:.2g} at most; 0 says nothing of safety"
    if budget is not None:
        note += ", and what is refuted below the budget is what the budget allows"
        if found.epsilon > budget:
            note = (
                f"epsilon {found.epsilon:.3g} is refuted, ABOVE THE BUDGET of {budget:g}: the guarantee does not hold"
            )
    return Trial(
        "canaries",
        words,
        "epsilon refuted (95 % sure)",
        found.epsilon,
        None,
        0.0,
        found.epsilon > 0,
        {"canaries": found.canaries, "guesses": found.guesses, "right": found.correct},
        open=is_open,
        most=most,
        note=note,
    )


def _exposure(
    words: str,
    bench: Workbench,
    forms: Sequence[Space],
    secrets: Sequence[str],
    included: NDArray[np.bool_],
    is_open: bool,
) -> Trial:
    def encode(text: str) -> Encoded:
        return canary_tokens(bench, [canary_row(bench.data.kind, text, users=by_user(bench.recipe))])[0]

    limit, packing = bench.recipe.evaluation.batch_tokens, bench.recipe.training.packing

    def bits(there: bool) -> list[float]:
        chosen = np.flatnonzero(included == there)[:EXPOSED].tolist()
        return [exposures(bench.model, forms[i], [secrets[i]], encode, limit, packing=packing)[0] for i in chosen]

    inside, outside = bits(True), bits(False)
    p_value = float(mannwhitneyu(inside, outside, alternative="greater").pvalue)
    return Trial(
        "canaries",
        words,
        "mean exposure (bits)",
        float(np.mean(inside)),
        None,
        float(np.mean(outside)),
        p_value < LEVEL,
        {"planted": len(inside), "not planted": len(outside)},
        open=is_open,
        most=math.log2(10**DIGITS),
    )
