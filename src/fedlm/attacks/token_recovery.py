"""DAGER on the first round of a recipe: which tokens of their rows do the silos' updates tell?

The recipe's own update is attacked as the coordinator has it: each silo's, or under masks the sum; and, where the
coordinator adds noise, also the noised sum that all others see. On the same rows an open configuration is attacked: the
full gradient of the first layer's attention by one step of SGD in fp32, on so few of their tokens that a span can
tell them. The attacker knows how many distinct tokens there are, and names the nearest to the update's span, or to its
strongest directions, whichever is better; the baseline names as many of the most frequent public tokens.

In round 0 a LoRA adapter's B is 0, so A does not move in the first local step; what A tells comes from further steps.
Later rounds tell more of a silo that takes one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest

from fedlm.attacks.dager import attention_gradients, frequent_tokens, nearest_tokens
from fedlm.attacks.first_round import FirstRound, first_round
from fedlm.attacks.trial import LEVEL, Trial
from fedlm.data.federated import FederatedData
from fedlm.errors import PrivacyError
from fedlm.evaluation.intervals import wilson
from fedlm.messages import Observe, Tensors
from fedlm.models.load import load_base
from fedlm.recipe.guards import mask_of
from fedlm.recipe.methods import ALGORITHMS
from fedlm.recipe.privacy import IN_TRAINING
from fedlm.recipe.schema import Recipe
from fedlm.recipe.tasks import TASKS
from fedlm.training.attention import causal_model

SILOS = 4
"""Silos whose updates are attacked, at most."""
OPEN_ROWS, OPEN_TOKENS = 4, 64
"""Of an open configuration, at most, a row's tokens being cut; and no more distinct tokens than half of the width."""
READINGS = (0.0, 0.01, 1.0)
"""How much of an update's entries, as a share of their root mean square, the attacker takes for noise: nothing; what
rounding leaves; all that has no direction. The best reading counts, and significance is corrected for their number."""
FIGURE = "distinct tokens named"


@dataclass(frozen=True)
class _Unit:
    """One update, and the rows that it was made of."""

    update: Tensors
    rows: Sequence[Sequence[int]]


def token_trials(
    recipe: Recipe, data: FederatedData, base: Path, *, seed: int = 0, observe: Observe | None = None
) -> list[Trial]:
    """Attack the recipe's round 0; the open configuration comes first.

    Args:
        base: the folder that relative paths of the recipe start from.

    Raises:
        PrivacyError: the recipe sends no update that this attack reads, or the round reads no rows.
        ModelError: neither the update nor the model has the layers that it reads.
        FedlmError: the round fails.
    """
    if (why := not_covered(recipe)) is not None:
        raise PrivacyError(why)
    tell = observe or (lambda _: None)
    model = _plain_model(recipe)
    attention_gradients(
        open_update(model, [[0, 1]]), 0
    )  # before anything is trained: whether the model has such layers
    tell({"kind": "phase", "text": "simulating round 0 of the recipe"})
    found = first_round(recipe, data, base, seed=seed, observe=observe)
    tell({"kind": "phase", "text": "reading tokens out of updates"})
    units = _units(recipe, found)
    width = causal_model(model).config.hidden_size
    few = [open_batch([row.ids.tolist() for row in rows], width) for _, rows in sorted(found.rows.items())[:SILOS]]
    opened = [_Unit(open_update(model, rows), rows) for rows in few if rows]
    public = [s.ids for s in found.public]
    trials = [_trial(model, "one step of SGD in fp32, full gradient, unprotected", opened, public, is_open=True)]
    return trials + [_trial(model, words, some, public) for words, some in units.items()]


def not_covered(recipe: Recipe) -> str | None:
    """Why the attack has nothing to read; None where it does."""
    method, facts = ALGORITHMS[recipe.federation.algorithm.name], TASKS[recipe.task]
    name = recipe.federation.algorithm.name
    if recipe.search is not None or recipe.in_context is not None:
        return "nothing is trained, so there is no update"
    if facts.head != "none" or not facts.likelihood:
        return f"task '{recipe.task}' does not learn the next token, and this attack is for updates that do"
    if method.zeroth_order:
        return f"'{name}' sends no gradient, and this attack reads gradients"
    if method.asynchronous:
        return f"'{name}' has no rounds, and this attack is tried on round 0"
    if method.setup_rounds:
        return f"'{name}' sends a sketch in round 0, and no update"
    if recipe.adapter.kind not in ("lora", "full"):
        return f"adapter '{recipe.adapter.kind}' has no gradient with the layers' inputs as its rows"
    return None


def open_batch(rows: Sequence[Sequence[int]], width: int) -> list[list[int]]:
    """As many beginnings of these rows as an open configuration takes (see `OPEN_ROWS`)."""
    found: list[list[int]] = []
    seen: set[int] = set()
    for row in rows:
        ids: list[int] = []
        for token in list(row)[:OPEN_TOKENS]:
            if token not in seen and len(seen) >= width // 2:
                break
            seen.add(token)
            ids.append(token)
        if len(ids) > 1:
            found.append(ids)
        if len(found) == OPEN_ROWS or len(seen) >= width // 2:
            break
    return found


def open_update(model: Any, batch: Sequence[Sequence[int]]) -> Tensors:
    """The gradient of the mean loss of all tokens, for the first layer's attention: what one step of SGD sends."""
    wanted = {n: p for n, p in model.named_parameters() if ".layers.0.self_attn." in f".{n}"}
    for parameter in wanted.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    for ids in batch:
        row = torch.tensor([list(ids)], dtype=torch.long)
        loss = model(input_ids=row, labels=row, use_cache=False).loss / len(batch)
        if loss.requires_grad:
            loss.backward()
    return {n: p.grad.clone() for n, p in wanted.items() if p.grad is not None}


def _plain_model(recipe: Recipe) -> Any:
    """What silos begin with, in fp32 and without an adapter: what the first layer reads is the same."""
    model = load_base(recipe.model.model_copy(update={"quantise": None}), device="cpu").float()
    model.requires_grad_(False)
    return model.eval()


def _units(recipe: Recipe, found: FirstRound) -> dict[str, list[_Unit]]:
    """By configuration, what is attacked in it."""
    training = recipe.training
    amount = f"steps: {training.steps}" if training.steps is not None else f"epochs: {training.epochs:g}"
    kind = f"LoRA of rank {recipe.adapter.rank}" if recipe.adapter.kind == "lora" else "all weights"
    how = f"{training.optimizer}, {amount}, batches of {training.batch_size}, {kind}"
    smaller = [guard.name for guard in recipe.guards if guard.name != "mask"]
    how += f", sent as {' and '.join(smaller)}" if smaller else ""
    spec = recipe.privacy
    everyone = [list(row.ids) for rows in found.rows.values() for row in rows]
    if mask_of(recipe) is not None:
        noise = f", with the silos' noise for epsilon {spec.epsilon:g}" if spec is not None else ""
        return {f"the sum of {len(found.rows)} silos (masks): {how}{noise}": [_Unit(found.together, everyone)]}
    noise = ""
    if spec is not None:
        noise = (
            f", with noise for epsilon {spec.epsilon:g}" if spec.unit in IN_TRAINING else f", clipped to {spec.clip:g}"
        )
    single = [_Unit(u, [list(r.ids) for r in found.rows[silo]]) for silo, u in sorted(found.updates.items())[:SILOS]]
    units = {f"a silo's update, as the coordinator sees it: {how}{noise}": single}
    if found.together:
        assert spec is not None
        units[f"the noised sum of {len(found.rows)} silos, as others see it (epsilon {spec.epsilon:g})"] = [
            _Unit(found.together, everyone)
        ]
    return units


def _trial(model: Any, words: str, units: Sequence[_Unit], public: Sequence[Any], *, is_open: bool = False) -> Trial:
    """Of all units together: a token counts once for each unit that has it."""
    present = [{int(token) for row in unit.rows for token in row} for unit in units]
    guesses = [_frequent(public, len(there)) for there in present]
    hits_of: list[list[set[int]]] = [[] for _ in READINGS]
    for unit, there in zip(units, present, strict=True):
        size = _size(unit.update)
        for found, share in zip(hits_of, READINGS, strict=True):
            found.append(there & set(nearest_tokens(model, unit.update, len(there), share * size)))
    total = sum(map(len, present))
    if not total:
        raise PrivacyError("the round read no rows, so there are no tokens to be told")
    hits = max(hits_of, key=lambda found: sum(map(len, found)))
    blind = [guess & there for guess, there in zip(guesses, present, strict=True)]
    named, guessed = sum(map(len, hits)), sum(map(len, blind))
    return Trial(
        "dager",
        words,
        FIGURE,
        named / total,
        wilson(named, total),
        guessed / total,
        _better(hits, blind, LEVEL / len(hits_of)),
        {"updates": len(units), "rows": sum(len(unit.rows) for unit in units), "tokens": total},
        open=is_open,
        note="" if len(public) else "no public text of this kind is here: the baseline names tokens blindly",
    )


def _better(hits: Sequence[set[int]], blind: Sequence[set[int]], level: float) -> bool:
    """Whether more tokens were named by the attack alone than by the baseline alone (sign test)."""
    ours = sum(len(h - b) for h, b in zip(hits, blind, strict=True))
    theirs = sum(len(b - h) for h, b in zip(hits, blind, strict=True))
    return ours > theirs and float(binomtest(ours, ours + theirs, alternative="greater").pvalue) < level


def _frequent(public: Sequence[Any], count: int) -> set[int]:
    return set(frequent_tokens(public, count)) if len(public) else set(range(count))


def _size(update: Tensors) -> float:
    """The root mean square of the first layer's entries: were they noise, no direction would rise above it."""
    squares = [float(g.double().square().mean()) for g in attention_gradients(update, 0)]
    return float(np.sqrt(np.mean(squares)))
