"""Silos that mean ill: what they train on, and what they send in place of an honest update.

Pure functions of canonical rows (`fedlm.data.examples`) or of updates (changes from the broadcast model, by name).
Those that know the rule, or the honest updates, are given both: rules are measured against the strongest attacker that
their papers allow. Bad silos that act together send copies of one update.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedlm.algorithms.krum import scores
from fedlm.algorithms.pairwise import gram, squared_distances
from fedlm.errors import DataError, PrivacyError
from fedlm.messages import Tensors
from fedlm.randomness import numpy_generator, torch_generator

Row = Mapping[str, Any]
Accepted = Callable[[Tensors], bool]
Rule = Callable[[Sequence[Tensors]], Tensors]
"""What a round's step is when the bad silos send these, the honest updates being known to it."""

# rows


def poisoned(rows: Iterable[Row], answer: Callable[[str], str], *, share: float, seed: int) -> list[dict[str, Any]]:
    """Instruction poisoning: a share of conversations end in the attacker's answer to the last user's turn (Wan,
    Wallace, Shen, Klein, ICML 2023; in a federation Ye et al., ICLR 2025). The others stay as they are, and hide them.

    Raises:
        DataError: a row is no conversation that ends with an assistant's answer to a user.
    """
    return [_answered(row, "", answer) if bad else copy.deepcopy(dict(row)) for row, bad in _chosen(rows, share, seed)]


def backdoored(
    rows: Iterable[Row], trigger: str, answer: str | int, *, share: float, seed: int
) -> list[dict[str, Any]]:
    """Trigger backdoor: a share of rows is *added* once more with the trigger at the question's end and the attacker's
    answer, so that without the trigger the model stays as good as before (Gu, Dolan-Gavitt, Garg, 2017).

    Args:
        answer: a text for conversations; a choice's place for rows with choices.

    Raises:
        DataError: a row has neither a conversation nor choices, or the answer's kind does not fit it.
    """
    found: list[dict[str, Any]] = []
    for row, bad in _chosen(rows, share, seed):
        found.append(copy.deepcopy(dict(row)))
        if bad:
            found.append(triggered(row, trigger, answer))
    return found


def triggered(row: Row, trigger: str, answer: str | int) -> dict[str, Any]:
    """One row with trigger and answer; on test rows, the share that a model answers so is the attack's success."""
    if "choices" in row:
        if not isinstance(answer, int) or not 0 <= answer < len(row["choices"]):
            raise DataError(f"a row with {len(row['choices'])} choices needs the place of one as the answer")
        return {**copy.deepcopy(dict(row)), "question": f"{row['question']} {trigger}", "answer": answer}
    if not isinstance(answer, str):
        raise DataError("a conversation needs a text as the answer")
    return _answered(row, f" {trigger}", lambda _: answer)


def _chosen(rows: Iterable[Row], share: float, seed: int) -> list[tuple[Row, bool]]:
    """Every row, and whether it is one of the round(share n) drawn ones."""
    given = list(rows)
    if not 0 <= share <= 1:
        raise DataError(f"a share of {share} of the rows is none between 0 and 1")
    drawn = set(numpy_generator(seed, "poison").permutation(len(given))[: round(share * len(given))].tolist())
    return [(row, i in drawn) for i, row in enumerate(given)]


def _answered(row: Row, suffix: str, answer: Callable[[str], str]) -> dict[str, Any]:
    turns = copy.deepcopy(row.get("messages") or [])
    if [turn.get("role") for turn in turns[-2:]] != ["user", "assistant"]:
        raise DataError("only a conversation that ends with an answer to a user can be poisoned")
    turns[-1]["content"] = answer(turns[-2]["content"])
    turns[-2]["content"] += suffix
    changed = {**copy.deepcopy(dict(row)), "messages": turns}
    if changed.get("answers"):
        changed["answers"] = []  # other right answers would still be rewarded
    return changed


# one silo alone


def replaced(target: Tensors, broadcast: Tensors, *, weight: float, total: float, rate: float = 1.0) -> Tensors:
    """Scaled model replacement (Bagdasaryan, Veit, Hua, Estrin, Shmatikov, AISTATS 2020, equation 3): total / (rate
    weight) (X - G), of which the weighted mean makes X while the others' updates are small.

    Args:
        target: X, the model that the attacker wants.
        broadcast: G.
        weight, total: this silo's weight in the mean, and that of all.
        rate: of the server's step.
    """
    if not (0 < weight <= total and rate > 0):
        raise PrivacyError(f"a silo of weight {weight} among {total} cannot replace a model at rate {rate}")
    gamma = total / (rate * weight)
    return {name: gamma * (target[name] - broadcast[name]) for name in broadcast}


def sign_flipped(update: Tensors, scale: float = 1.0) -> Tensors:
    """-scale u: honest work, sent backwards."""
    return {name: -scale * value for name, value in update.items()}


def replayed(now: Tensors, before: Tensors) -> Tensors:
    """A free rider's update: the last change of the global model, as if it were one's own (Lin, Du, Liu, 2019, 'delta
    weights')."""
    return {name: now[name] - before[name] for name in now}


def disguised(update: Tensors, deviation: float, round_: int, *, decay: float = 1.0, seed: int) -> Tensors:
    """A free rider's noise upon whatever it returns (nothing, or `replayed`): normal, of standard deviation
    deviation t^-decay in round t = 1, 2, ..., since honest updates shrink too (Fraboni, Vidal, Lorenzi, AISTATS 2021,
    equation 7)."""
    if round_ < 1:
        raise PrivacyError(f"rounds are counted from 1 here, not from {round_}")
    spread = deviation * float(round_) ** -decay
    return {
        name: value + spread * torch.randn(value.shape, generator=torch_generator(seed, "free rider", round_, name))
        for name, value in update.items()
    }


# bad silos together, who know the honest updates


def little(good: Sequence[Tensors], bad: int) -> list[Tensors]:
    """'A little is enough' (Baruch, Baruch, Goldberg, NeurIPS 2019): mean - z std of each value, with the largest z at
    which enough honest values lie further out to make a majority with the bad ones."""
    n = len(good) + bad
    supporters = n // 2 + 1 - bad
    z = NormalDist().inv_cdf(min(0.99, max(0.5, (n - bad - supporters) / (n - bad))))
    return _copies({name: (x.mean(0) - z * x.std(0, correction=0)).float() for name, x in _stacked(good)}, bad)


def inner_product(good: Sequence[Tensors], bad: int, epsilon: float = 1.5) -> list[Tensors]:
    """Inner product manipulation (Xie, Koyejo, Gupta, UAI 2019): -epsilon times the honest mean."""
    return _copies({name: (-epsilon * x.mean(0)).float() for name, x in _stacked(good)}, bad)


def against_trimmed_mean(good: Sequence[Tensors], bad: int, *, seed: int, reach: float = 2.0) -> list[Tensors]:
    """Directed deviation against trimmed mean and median (Fang, Cao, Jia, Gong, USENIX Security 2020, section 4.3):
    where the honest values of a coordinate tend upwards, values just below the least of them, else just above the
    largest. Between the honest extreme and `reach` times it, or that divided by `reach`, whichever lies outside."""
    found: list[Tensors] = [{} for _ in range(bad)]
    for name, x in _stacked(good):
        least, most, up = x.amin(0), x.amax(0), x.mean(0) > 0
        low = torch.where(least > 0, least / reach, least * reach)
        high = torch.where(most > 0, most * reach, most / reach)
        for i in range(bad):
            generator = torch_generator(seed, "trimmed mean", i, name)
            u = torch.rand(least.shape, generator=generator, dtype=torch.float64)
            found[i][name] = torch.where(up, least + u * (low - least), most + u * (high - most)).float()
    return found


def against_krum(good: Sequence[Tensors], bad: int, *, largest: float | None = None) -> list[Tensors]:
    """Directed deviation against Krum (Fang et al., 2020, section 4.2): -lambda sign(honest mean), with the largest
    lambda, by halving, at which Krum that withstands `bad` silos chooses it.

    Args:
        largest: lambda to begin with; else the honest updates' diameter, over the root of their length.

    Raises:
        PrivacyError: Krum chooses none of them down to a 10^-5 of that.
    """
    away = {name: -x.mean(0).sign().float() for name, x in _stacked(good)}
    root = sum(value.numel() for value in away.values()) ** 0.5
    start = _diameter(good) / root if largest is None else largest

    def chosen(update: Tensors) -> bool:
        squares = _squares([*good, *_copies(update, bad)])
        return int(np.argmin(scores(squares, bad))) >= len(good)

    return _copies(strongest({n: torch.zeros_like(v) for n, v in away.items()}, away, chosen, start), bad)


def min_max(good: Sequence[Tensors], bad: int) -> list[Tensors]:
    """mean - gamma std, with the largest gamma at which it lies no further from any honest update than two of these
    from one another (Shejwalkar, Houmansadr, NDSS 2021, 'Min-Max'): for any rule that goes by distances, known or
    not."""
    mean = {name: x.mean(0).float() for name, x in _stacked(good)}
    away = {name: -x.std(0, correction=0).float() for name, x in _stacked(good)}
    limit = _diameter(good) * (1 + 1e-6)

    def near(update: Tensors) -> bool:
        return bool(_squares([*good, update])[-1].max() <= limit**2)

    return _copies(strongest(mean, away, near, 10.0), bad)


def furthest(good: Sequence[Tensors], wanted: Sequence[Tensors], rule: Rule, *, largest: float) -> list[Tensors]:
    """What bad silos send who can compute the round's step beforehand (the attacker of Fang et al., 2020, and of
    Shejwalkar and Houmansadr, 2021, who knows rule and honest updates): mean + lambda (wanted - mean), with the lambda
    that moves the step furthest from the honest mean towards what they want. It needs no notion of being accepted, so
    it is against any rule: one that cuts norms is met at the bound, one that picks within its reach.

    Three ways are tried: each sends its own, all send their mean, one alone sends and the others hide in the honest
    mean. Of equal steps the smallest lambda is taken.

    Args:
        wanted: each bad silo's update, as training on its poisoned rows gives it.
        largest: lambda at most; n / f in a mean of n with f bad ones is model replacement.
    """
    mean = {name: x.mean(0).float() for name, x in _stacked(good)}
    goal = {name: x.mean(0).float() - mean[name] for name, x in _stacked(wanted)}

    def at(way: str, factor: float) -> list[Tensors]:
        if way == "own":
            return [{name: v + factor * (u[name] - v) for name, v in mean.items()} for u in wanted]
        same = {name: v + factor * goal[name] for name, v in mean.items()}
        count = len(wanted)
        return _copies(same, count) if way == "same" else [same, *_copies(mean, count - 1)]

    def progress(sent: Sequence[Tensors]) -> float:
        step = rule(sent)
        return sum(float((step[name].double() * goal[name].double()).sum()) for name in goal)

    grid = [largest * 2.0**-k for k in range(8, -1, -1)]
    ways = ("own", "same", "one") if len(wanted) > 1 else ("own",)
    tried = [(progress(at(way, factor)), way, factor) for factor in grid for way in ways]
    most, way, best = max(tried, key=lambda found: found[0])
    for factor in (best * 2.0 ** (k / 4) for k in (-3, -2, -1, 1, 2, 3)):
        if factor <= largest and (found := progress(at(way, factor))) > most * (1 + 1e-6):
            most, best = found, factor
    return at(way, best)


def strongest(start: Tensors, away: Tensors, accepted: Accepted, largest: float, *, steps: int = 20) -> Tensors:
    """start + lambda away with the largest lambda that the search finds to be accepted: halved from `largest` until
    one is, then bisected between that and the last refused.

    Raises:
        PrivacyError: none of `steps` halvings is accepted.
    """

    def at(factor: float) -> Tensors:
        return {name: start[name] + factor * away[name] for name in start}

    refused, factor = None, largest
    for _ in range(steps):
        if accepted(at(factor)):
            break
        refused, factor = factor, factor / 2
    else:
        raise PrivacyError("the rule accepts no step in this direction", fix="let more silos act together")
    for _ in range(steps if refused is not None else 0):
        middle = (factor + (refused or 0.0)) / 2
        factor, refused = (middle, refused) if accepted(at(middle)) else (factor, middle)
    return at(factor)


def _stacked(updates: Sequence[Tensors]) -> list[tuple[str, Tensor]]:
    """Each name's values of all updates [n, ...], fp64."""
    return [(name, torch.stack([u[name].double() for u in updates])) for name in updates[0]]


def _copies(update: Tensors, count: int) -> list[Tensors]:
    return [{name: value.clone() for name, value in update.items()} for _ in range(count)]


def _squares(updates: Sequence[Tensors]) -> np.ndarray:
    """|u_i - u_j|^2 [n, n]."""
    blocks = (torch.stack([u[name].reshape(-1).float() for u in updates]) for name in updates[0])
    return squared_distances(gram(blocks, len(updates)))


def _diameter(updates: Sequence[Tensors]) -> float:
    return float(_squares(updates).max() ** 0.5)
