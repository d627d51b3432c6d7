"""Rules against bad silos on dense vectors, written a second time with NumPy, SciPy and scikit-learn: as updates
travel, and on LoRA's products."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from sklearn.cluster import HDBSCAN
from sklearn.metrics.pairwise import cosine_distances

from fedlm.algorithms import pairwise, spaces
from fedlm.algorithms.flame import majority
from fedlm.algorithms.foolsgold import credibility
from fedlm.algorithms.rfa import weiszfeld
from fedlm.models.deltas import pieces_of
from fedlm.recipe.methods import ALGORITHMS

from .bad_silos import F64, HEAD, LAYERS, RANK, changes, draw, flat, honest, moved, step, theta, together

N, BAD = 11, 2
WEIGHTS = [1.0, 5.0, 2.0, 3.0, 4.0, 6.0, 2.0, 3.0, 1.0, 2.0, 3.0]


def krum_order(x: F64, f: int) -> list[int]:
    found = []
    for i in range(len(x)):
        apart = sorted(float(np.sum((x[i] - x[j]) ** 2)) for j in range(len(x)) if j != i)
        found.append(sum(apart[: max(1, len(x) - f - 2)]))
    return sorted(range(len(x)), key=lambda i: found[i])


def krum(x: F64, f: int = BAD) -> F64:
    return x[krum_order(x, f)[0]]


def multi_krum(x: F64, m: int = N - BAD - 2) -> F64:
    return x[krum_order(x, BAD)[:m]].mean(0)


def bulyan(x: F64) -> F64:
    left, chosen = list(range(N)), []
    while len(chosen) < N - 2 * BAD:
        chosen.append(left.pop(krum_order(x[left], BAD)[0]))
    kept, beta = x[chosen], N - 4 * BAD
    found = []
    for column in kept.T:
        near = sorted(column, key=lambda value: (abs(value - np.median(column)), value))
        found.append(np.mean(near[:beta]))
    return np.array(found)


def norm_bound(x: F64, bound: float | None = None) -> F64:
    norms = np.linalg.norm(x, axis=1)
    bound = float(np.median(norms)) if bound is None else bound
    return np.average([u / max(1.0, n / bound) for u, n in zip(x, norms, strict=True)], axis=0, weights=WEIGHTS)


def centred_clipping(x: F64, radius: float = 0.7, iterations: int = 3) -> F64:
    v = np.zeros(x.shape[1])
    for _ in range(iterations):
        v = v + np.mean([(u - v) * min(1.0, radius / np.linalg.norm(u - v)) for u in x], axis=0)
    return v


def fltrust(x: F64, root: int = 1) -> F64:
    trust, total = [], np.zeros(x.shape[1])
    for i, u in enumerate(x):
        if i != root:
            size, own = np.linalg.norm(u), np.linalg.norm(x[root])
            trust.append(max(0.0, float(u @ x[root] / (size * own))))
            total += trust[-1] * own / size * u
    return total / sum(trust)


def foolsgold(x: F64) -> F64:
    s = 1.0 - cosine_distances(x) - np.eye(len(x))
    v = [max(row) for row in s]
    for i, j in itertools.product(range(len(x)), repeat=2):
        if v[j] > v[i]:
            s[i, j] *= v[i] / v[j]
    a = np.clip(1.0 - s.max(1), 0, 1)
    a = np.clip(a / a.max(), 1e-12, 1 - 1e-12)
    return np.clip(np.log(a / (1 - a)) + 0.5, 0, 1) @ x / len(x)


def flame(x: F64) -> F64:
    labels = HDBSCAN(
        min_cluster_size=N // 2 + 1,
        min_samples=2,
        metric="cosine",
        algorithm="brute",
        allow_single_cluster=True,
        copy=True,
    ).fit_predict(x)
    norms = np.linalg.norm(x, axis=1)
    return np.mean([u * min(1.0, np.median(norms) / n) for u, n, k in zip(x, norms, labels, strict=True) if k == 0], 0)


def geometric_median(x: F64, weights: list[float] = WEIGHTS) -> F64:
    """By a quasi-Newton method in the space that the vectors span."""
    basis = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][: len(x) - 1]
    y, p = (x - x.mean(0)) @ basis.T, np.array(weights) / sum(weights)

    def total(v: F64) -> tuple[float, F64]:
        apart = np.linalg.norm(v - y, axis=1)
        return float(p @ apart), (p / apart) @ (v - y)

    found = optimize.minimize(total, np.median(y, 0), jac=True, method="BFGS", options={"gtol": 1e-10})
    return x.mean(0) + found.x @ basis


def can_product(name: str) -> bool:
    return not ALGORITHMS[name].no_product


RULES: list[tuple[dict[str, Any], Callable[[F64], F64], list[float] | None]] = [
    ({"name": "krum", "byzantine": BAD}, krum, None),
    ({"name": "multi-krum", "byzantine": BAD}, multi_krum, None),
    ({"name": "multi-krum", "byzantine": BAD, "selected": 3}, lambda x: multi_krum(x, 3), None),
    ({"name": "median"}, lambda x: np.median(x, axis=0), None),
    ({"name": "trimmed-mean", "byzantine": BAD}, lambda x: stats.trim_mean(x, (BAD + 0.1) / N, axis=0), None),
    ({"name": "bulyan", "byzantine": BAD}, bulyan, None),
    ({"name": "rfa"}, geometric_median, WEIGHTS),
    ({"name": "norm-bound"}, norm_bound, WEIGHTS),
    ({"name": "norm-bound", "norm_bound": 0.5}, lambda x: norm_bound(x, 0.5), WEIGHTS),
    ({"name": "centred-clipping", "clip_radius": 0.7, "clip_iterations": 3}, centred_clipping, None),
    ({"name": "fltrust", "root": "silo-01"}, fltrust, None),
    ({"name": "foolsgold"}, foolsgold, None),
    ({"name": "flame", "noise": 0.0}, flame, None),
]
CASES = [(r, on) for r in RULES for on in ("factors", "product") if on == "factors" or can_product(r[0]["name"])]


def updates() -> list[dict[str, torch.Tensor]]:
    """Nine honest silos, one that turned round, and one of another size."""
    good = honest(N - 2)
    return [*good, {n: -0.5 * u for n, u in good[3].items()}, {n: 4 * u for n, u in good[5].items()}]


def close(found: F64, wanted: F64, tolerance: float = 2e-6) -> None:
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize(("rule", "robust_on"), CASES, ids=[f"{rule[0]['name']}-{on}" for rule, on in CASES])
@pytest.mark.parametrize("server_lr", [None, 0.5])
def test_it_is_the_dense_rule(
    rule: tuple[Any, Any, Any], robust_on: str, server_lr: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, dense, weights = rule
    monkeypatch.setattr(spaces, "ELEMENTS", 700)  # several blocks of every tensor
    sent = updates()
    x = np.stack([flat(u) for u in sent]) if robust_on == "factors" else changes(sent)
    found = moved(sent, tmp_path, weights=weights, robust_on=robust_on, server_lr=server_lr, **spec)
    assert np.linalg.norm(dense(x)) > 0.01
    close(found, dense(x) * (server_lr or 1.0), 1e-5)


@pytest.mark.parametrize("robust_on", ["factors", "product"])
def test_a_huge_update_that_is_cut_counts_exactly(robust_on: str, tmp_path: Path) -> None:
    """Its coefficient is 1e-30, or 1e-60 of products, which fp32 cannot say."""
    sent = [*updates()[:-1], {n: 1e30 * u for n, u in updates()[0].items()}]
    x = np.stack([flat(u) for u in sent]) if robust_on == "factors" else changes(sent)
    options = {"name": "norm-bound", "norm_bound": 0.5, "robust_on": robust_on}
    found = moved(sent, tmp_path, weights=WEIGHTS, **options)
    close(found, norm_bound(x, 0.5), 1e-5)
    without = moved(sent[:-1], tmp_path, weights=WEIGHTS[:-1], **options)
    assert np.linalg.norm(without - found) > 0.01 * np.linalg.norm(found)


def test_products_and_factors_are_not_the_same(tmp_path: Path) -> None:
    """So that a rule that ignored `robust_on` would be found out."""
    apart, sent = [], updates()
    for name in ("median", "multi-krum"):
        after = [step(sent, tmp_path, name=name, byzantine=BAD, robust_on=on)[0] for on in ("factors", "product")]
        one, other = (changes([{n: a[n] - theta()[n] for n in theta()}])[0] for a in after)
        apart.append(np.linalg.norm(one - other) / np.linalg.norm(one))
    assert min(apart) > 1e-3


@pytest.mark.parametrize("name", ["krum", "multi-krum", "rfa", "fltrust", "norm-bound", "flame"])
def test_inner_products_are_those_of_the_dense_changes(name: str, tmp_path: Path) -> None:
    """What is compared are the changes of s B A, of small changes to a large B A."""
    small = [{n: 1e-3 * u for n, u in update.items()} for update in updates()]
    x = changes(small)
    seen: list[F64] = []

    class Looked(spaces.Products):
        def moved(self, c: F64) -> Any:
            seen.extend([self.gram(), np.diag(self.squares()), self.inner(4)[:, None]])
            return super().moved(c)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spaces, "Products", Looked)
        step(small, tmp_path, name=name, robust_on="product", root="silo-01", noise=0.0)
    g, squares, inner = seen
    wanted = x @ x.T
    np.testing.assert_allclose(g, wanted, rtol=0, atol=1e-5 * wanted.max())
    np.testing.assert_allclose(np.diag(squares), np.diag(wanted), rtol=1e-5)
    np.testing.assert_allclose(inner[:, 0], wanted[:, 4], rtol=0, atol=1e-5 * wanted.max())


def test_many_silos_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedlm.algorithms import lora

    whole = moved(updates(), tmp_path, name="multi-krum", byzantine=BAD, robust_on="product")
    monkeypatch.setattr(lora, "STACK", 2 * RANK)
    parts = moved(updates(), tmp_path, name="multi-krum", byzantine=BAD, robust_on="product")
    close(parts, whole, 1e-6)


def test_the_krum_of_products_has_the_rank_of_factors_and_merges_nothing(tmp_path: Path) -> None:
    krum_, _, figures = step(updates(), tmp_path, name="krum", byzantine=BAD, robust_on="product")
    assert not pieces_of(krum_) and sum(figures["coefficients"].values()) == 1 and "deltas" not in figures
    mean, _, figures = step(updates(), tmp_path, name="multi-krum", byzantine=BAD, robust_on="product")
    assert set(pieces_of(mean)) == set(LAYERS) and figures["deltas"]["pieces"] == len(LAYERS)
    for layer in LAYERS:
        a = mean[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(a @ a.t(), torch.eye(RANK), rtol=0, atol=1e-5)
    cut, _, _ = step(updates(), tmp_path, name="multi-krum", byzantine=BAD, robust_on="product", recompress=2)
    assert all(len(piece["0"][1]) == 2 for piece in pieces_of(cut).values())
    again, _, figures = step(updates(), tmp_path, name="median", robust_on="product", start=mean, round_=1)
    assert {name for name in again if "lora" in name} == {name for name in theta() if "lora" in name}


def test_the_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    """With no angle of 120 degrees or more it sees every side under 120; else it is the corner."""
    corners = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 3.0]])
    v = weiszfeld(corners @ corners.T, np.full(3, 1 / 3), 1e-9) @ corners
    rays = (corners - v) / np.linalg.norm(corners - v, axis=1)[:, None]
    np.testing.assert_allclose((rays @ rays.T)[np.triu_indices(3, 1)], -0.5, atol=1e-6)
    blunt = np.array([[0.0, 0.0], [5.0, 0.2], [-5.0, 0.2]])
    np.testing.assert_allclose(weiszfeld(blunt @ blunt.T, np.full(3, 1 / 3), 1e-9) @ blunt, 0.0, atol=1e-4)


def test_most_of_the_weight_decides_the_geometric_median() -> None:
    x = np.array([[0.0, 0.0], [3.0, 1.0], [-2.0, 5.0]])
    np.testing.assert_allclose(weiszfeld(x @ x.T, np.array([0.2, 0.6, 0.2]), 1e-9) @ x, x[1], atol=1e-6)


def test_distances_of_combinations_do_not_cancel_beside_a_huge_vector() -> None:
    """One vector is 1e30 away: what is between the others stays right."""
    x = np.random.default_rng(0).normal(size=(6, 40))
    g = pairwise.gram([torch.from_numpy(np.vstack([x, 1e30 * np.ones(40)])).float()], 7)
    anchored = pairwise.Anchored(g, 2)
    c = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.2, 0.0])
    wanted = np.linalg.norm(c[:6] @ x - x, axis=1)
    np.testing.assert_allclose(anchored.distances(c)[:6], wanted, rtol=1e-5)
    c = np.array([0.3, 0.2, 0.1, 0.1, 0.1, 0.2 - 1e-30, 1e-30])
    np.testing.assert_allclose(
        anchored.distances(c)[:6], np.linalg.norm(c[:6] @ x + np.ones(40) - x, axis=1), rtol=1e-5
    )


def test_histories_of_one_hand_count_for_nothing() -> None:
    """The paper's two ends: the same history three times, and one like no other."""
    x = np.eye(5)[[0, 0, 0, 1, 2]]
    np.testing.assert_allclose(credibility(x @ x.T, 1.0), [0, 0, 0, 1, 1])
    assert not credibility(np.ones((3, 3)), 1.0).any(), "all alike"


def test_foolsgold_remembers(tmp_path: Path) -> None:
    """Sybils that differ in one round are told by their sums; its state is those sums."""
    good, state = honest(4, spread=3.0), None
    sybil = {n: draw(*u.shape, seed=77) for n, u in good[0].items()}
    sums = np.zeros((7, len(flat(sybil))))
    for round_ in range(6):
        noisy = [{n: u + 1.5 * draw(*u.shape, seed=round_ * 9 + i + 500) for n, u in sybil.items()} for i in range(3)]
        sent = [*honest(4, spread=3.0, seed=round_), *noisy]
        sums += np.stack([flat(u) for u in sent])
        _, state, figures = step(sent, tmp_path, name="foolsgold", state=state, round_=round_)
        counted = list(figures["coefficients"].values())
        if round_ == 0:
            first = max(counted[4:])
    assert max(counted[4:]) < 0.5 * first and min(counted[:4]) > max(counted[4:])
    assert state is not None
    np.testing.assert_allclose(np.stack([state[f"history/silo-{i:02}"].numpy() for i in range(7)]), sums, atol=1e-5)


def test_the_centre_of_clipping_is_the_last_step(tmp_path: Path) -> None:
    sent, options = updates(), {"name": "centred-clipping", "clip_radius": 0.7}
    after, state, _ = step(sent, tmp_path, **options)
    v = np.concatenate([state[f"centre/{n}"].reshape(-1).numpy() for n in sorted(theta())])
    close(flat(after) - flat(theta()), v.astype(np.float64))
    x = np.stack([flat(u) for u in sent])
    second, _, _ = step(sent, tmp_path, state=state, start=after, round_=1, **options)
    pulled = v + np.mean([(u - v) * min(1.0, 0.7 / np.linalg.norm(u - v)) for u in x], axis=0)
    close(flat(second) - flat(after), pulled, 1e-5)


def test_fltrust_stays_where_nobody_agrees_with_the_root(tmp_path: Path) -> None:
    good = honest(4)
    turned = [good[0], *({n: -u for n, u in update.items()} for update in good[1:])]
    assert not moved(turned, tmp_path, name="fltrust", root="silo-00").any()
    silent = [{n: torch.zeros_like(u) for n, u in good[0].items()}, *good[1:]]
    assert not moved(silent, tmp_path, name="fltrust", root="silo-00").any()


def test_flames_noise_is_that_share_of_the_median_norm(tmp_path: Path) -> None:
    sent = updates()
    plain = moved(sent, tmp_path, name="flame", noise=0.0)
    noisy, _, figures = step(sent, tmp_path, name="flame", noise=0.01)
    noise = flat(noisy) - flat(theta()) - plain
    sigma = 0.01 * np.median([np.linalg.norm(flat(u)) for u in sent])
    assert noise.std() == pytest.approx(sigma, rel=0.1) and abs(noise.mean()) < 4 * sigma / len(noise) ** 0.5
    assert figures["noise_norm"] == pytest.approx(0.01 * len(noise) ** 0.5)
    assert 6 <= len(figures["chosen"]) < 11 and "silo-09" not in figures["chosen"], "who turned round"
    again, _, _ = step(sent, tmp_path, name="flame", noise=0.01)
    other, _, _ = step(sent, tmp_path, name="flame", noise=0.01, round_=1)
    assert torch.equal(again[HEAD], noisy[HEAD]) and not torch.equal(other[HEAD], noisy[HEAD])
    usual, _, figures = step(sent, tmp_path, name="flame")  # of all values together a tenth, whatever their number
    median = np.median([np.linalg.norm(flat(u)) for u in sent])
    assert np.linalg.norm(flat(usual) - flat(theta()) - plain) == pytest.approx(0.1 * median, rel=0.1)
    assert figures["noise_norm"] == pytest.approx(0.1)


@pytest.mark.parametrize("seed", range(20))
def test_flame_admits_more_than_half_and_no_minority_apart(seed: int) -> None:
    random = np.random.default_rng(seed)
    good, bad = (u := int(random.integers(3, 15))), int(random.integers(0, u))
    x = random.normal(size=(good + bad, 60)) * 0.5 + np.repeat([[1.0], [-1.0]], [good, bad], axis=0)
    admitted = majority(cosine_distances(x))
    assert admitted.sum() > len(x) / 2 and not admitted[good:].any()
    crowd = majority(cosine_distances(random.normal(size=(12, 60))))
    assert 6 < crowd.sum() <= 12
    assert majority(np.array([[0.0, 2.0], [2.0, 0.0]])).all()


def test_one_attacker_of_many_shapes_leaves_the_others_result_alone(tmp_path: Path) -> None:
    """Coordinates nearest the median: no bad value enters where all bad ones lie outside."""
    good = honest(N - BAD)
    x = np.sort(np.stack([flat(u) for u in good]), axis=0)
    found = moved([*good, *together(good, BAD)], tmp_path, name="bulyan", byzantine=BAD)
    assert np.all(found >= x[0] - 1e-6) and np.all(found <= x[-1] + 1e-6)
