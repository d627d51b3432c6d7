"""Users as units: the mean of a user's gradients, clipped as a whole, against one backward pass after another."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from fedlm.errors import DataError, TrainingError
from fedlm.models.adapters import trainable
from fedlm.training.encode import TokenSet
from fedlm.training.private.gradients import Clipped, Way, clipped_sum
from fedlm.training.private.loop import private_mode
from fedlm.training.private.sampling import rows_by_user, some_rows
from fedlm.training.sequences import Example
from tests.training.private.helpers import KINDS, clipped, made, norm, off, task, texts, truth
from tests.training.private.test_loop import fit, furthest, mechanism, spec, values

SIZES = (3, 1, 2, 1, 4, 2)
"""Examples of each user."""


def grouped(examples: list[Example]) -> list[list[Example]]:
    ends = np.cumsum(SIZES)
    return [
        [examples[i % len(examples)] for i in range(end - size, end)] for size, end in zip(SIZES, ends, strict=True)
    ]


def found(objective: Any, users: list[list[Example]], clip: float, way: Way | None = None, **more: Any) -> Clipped:
    model = objective.tools.model
    with private_mode(model, objective):
        return clipped_sum(objective, trainable(model), users, clip, way=way, **more)


def means(objective: Any, model: Any, users: list[list[Example]]) -> list[dict[str, Tensor]]:
    """Of each user, the mean over its examples of gradients that are each from a backward pass of its own."""
    each = [truth(objective, model, user) for user in users]
    return [{n: sum(g[n] for g in of) / len(of) for n in of[0]} for of in each]  # type: ignore[misc]


@pytest.mark.parametrize("way", [None, "hooks", "fast", "ghost", "micro"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_users_mean_is_clipped_as_a_whole(kind: str, way: Way | None, base: Any) -> None:
    """To 2e-6 of the whole sum in fp32, 1e-5 of each parameter's own. Ghost norms have a safeguard in their square."""
    model = made(base, kind)
    objective, examples = task("text", model)
    users = grouped(examples)
    apart = means(objective, model, users)
    norms = [norm(g.values()) for g in apart]
    clip = float(np.median(norms))
    here = found(objective, users, clip, way)
    np.testing.assert_allclose(here.norms.numpy(), norms, rtol=1e-5)
    true = clipped(apart, clip)
    assert norm([here.total[n] - true[n] for n in true]) < (1e-5 if way == "ghost" else 2e-6) * norm(true.values())
    assert off(here.total, true) < 1e-5
    assert len(here.losses) == len(users)


@pytest.mark.parametrize("name", ["classify", "reward", "dpo", "orpo"])
def test_other_objectives_by_user(name: str, base: Any) -> None:
    model = made(base, "lora", {"classify": 3, "reward": 1}.get(name, 0))
    objective, examples = task(name, model)
    users = grouped(examples)
    apart = means(objective, model, users)
    clip = float(np.median([norm(g.values()) for g in apart]))
    assert off(found(objective, users, clip).total, clipped(apart, clip)) < 1e-5


@pytest.mark.parametrize("tokens", [1, 60, 10_000])
def test_passes_of_any_size_give_the_same(tokens: int, base: Any) -> None:
    objective, examples = task("text", made(base, "lora"))
    users = grouped(examples)
    once = found(objective, users, 0.5)
    parts = found(objective, users, 0.5, micro_tokens=tokens)
    assert off(parts.total, once.total) < 1e-5
    torch.testing.assert_close(parts.norms, once.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.losses, once.losses, rtol=1e-5, atol=1e-6)


def test_a_user_moves_the_sum_by_at_most_the_clip(base: Any) -> None:
    """However many rows it has: here by C almost exactly."""
    objective, examples = task("text", made(base, "lora"))
    users = grouped(examples)
    clip = 0.3 * float(found(objective, users, 1.0).norms.min())
    everyone = found(objective, users, clip).total
    for i in range(len(users)):
        others = found(objective, users[:i] + users[i + 1 :], clip).total
        assert 0.999 * clip < norm([everyone[n] - others[n] for n in everyone]) <= clip * (1 + 1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_row_a_user_is_unit_example_to_the_bit(optimizer: str, base: Any) -> None:
    data = TokenSet.of(texts(8))
    owned = replace(data, users=np.array([50, 7, 9, 1, 30, 2, 8, 4]))
    ends = []
    for more in ({"data": data}, {"data": owned, "picks": np.random.default_rng(1)}):
        model = made(copy.deepcopy(base), "lora")
        fit(model, mechanism(user_examples=1 if "picks" in more else None), spec(optimizer=optimizer, lr=1e-2), **more)
        ends.append(values(model))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


def test_users_are_drawn_and_not_rows(base: Any) -> None:
    """Two users of four rows each, one of them always drawn alone: the step is its mean, whatever its rows are."""
    data = replace(TokenSet.of(texts(8)), users=np.array([3, 3, 5, 5, 3, 5, 3, 5]))
    model = made(base, "lora")
    m = mechanism(rate=1.0, noise=0.0, clip=float("inf"), expected=2.0, steps=1, user_examples=4)
    before, objective = values(model), task("text", model)[0]
    apart = means(objective, model, [[texts(8)[i] for i in rows] for rows in ([0, 1, 4, 6], [2, 3, 5, 7])])
    result = fit(model, m, data=data, picks=np.random.default_rng(1))
    assert (result.examples, result.loss_count) == (8, 2)
    wanted = {n: before[n] - 0.1 * (apart[0][n] + apart[1][n]) / 2 for n in before}
    assert furthest(values(model), wanted) < 1e-6


def test_without_a_user_nothing_is_trained(base: Any) -> None:
    with pytest.raises(TrainingError, match="do not say whose they are"):
        fit(made(base, "lora"), mechanism(user_examples=2), picks=np.random.default_rng(1))
    one, other = texts(2)
    with pytest.raises(DataError, match="1 of 2 examples do not say whose they are"):
        TokenSet.of([replace(one, user=5), other])


def test_users_stay_beside_their_examples() -> None:
    tokens = TokenSet.of([replace(e, user=i % 3) for i, e in enumerate(texts(6))])
    assert tokens.users is not None and tokens.users.tolist() == [0, 1, 2, 0, 1, 2]
    assert tokens[4].user == 1 and tokens.subset(np.array([5, 0])).users.tolist() == [2, 0]  # type: ignore[union-attr]
    assert TokenSet.of(texts(2)).users is None and texts(1)[0].user is None


def test_rows_by_user_are_in_the_order_of_their_first() -> None:
    assert [r.tolist() for r in rows_by_user(np.array([9, 4, 9, 1, 4, 9]))] == [[0, 2, 5], [1, 4], [3]]
    assert [r.tolist() for r in rows_by_user(np.array([5, 3, 8]))] == [[0], [1], [2]]


def test_some_rows_are_uniform_without_replacement() -> None:
    """Chi-square over all 10 pairs of 5 rows, p > 1e-3."""
    rows, generator = np.array([3, 5, 7, 11, 13]), np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(5000):
        drawn = tuple(some_rows(rows, 2, generator).tolist())
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 10 and all(a < b for a, b in counts)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3
    assert some_rows(rows, 5, generator).tolist() == rows.tolist()
