"""What the factor methods do to given factors, against closed forms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Place, Step
from fedlm.algorithms.fedrot_lora import aligning
from fedlm.algorithms.fedsvd import orthonormal
from fedlm.messages import Tensors
from fedlm.models.deltas import deltas_of
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
D_OUT, D_IN, R, WEIGHTS = 20, 30, 4, (1.0, 5.0, 2.0)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turn(seed: int) -> Tensor:
    return torch.linalg.qr(draw(R, R, seed=seed))[0]


def aggregate(
    name: str, theta: Tensors, trained: list[Tensors], round_: int, folder: Path, **options: float
) -> Tensors:
    """The server's new factors when silos of these weights have trained these."""
    algorithm = get_algorithm(AlgorithmSpec(name=name, **options), AdapterSpec(rank=R))
    accumulator = algorithm.accumulator(folder)
    for i, (factors, weight) in enumerate(zip(trained, WEIGHTS, strict=True)):
        place = Place(f"silo-{i}", round_, 9, rank=R)
        update, _ = algorithm.local(theta, {}, place).finish(factors)
        algorithm.fold(accumulator, update, weight, place)
    stepped, _ = algorithm.server_step(theta, accumulator, algorithm.init_state(theta), Step(round_, 3))
    return stepped


@pytest.mark.parametrize("name", ["fedex-lora", "flora", "flexlora", "hetlora", "lora-fair"])
def test_how_many_silos_are_read_at_once_changes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta, trained = turned(0.3)
    whole = aggregate(name, theta, trained, 1, tmp_path)
    for module in ("lora", "hetlora"):
        monkeypatch.setattr(f"fedlm.algorithms.{module}.STACK", R)
    one_by_one = aggregate(name, theta, trained, 1, tmp_path)
    assert whole.keys() == one_by_one.keys()
    for added, other in zip(*map(pieces, (whole, one_by_one)), strict=True):
        assert (added - other).norm() < 1e-6 * added.norm()


def pieces(stepped: Tensors) -> list[Tensor]:
    """The product of the factors, and what was merged, in fp64."""
    low = [stepped[B].double() @ stepped[A].double()] if A in stepped else []
    merged = (delta for delta in deltas_of(stepped).values())
    return [*low, *(d.W.double() if d.W is not None else d.B.double() @ d.A.double() for d in merged)]  # type: ignore[union-attr]


def error(got: Tensors, trained: list[Tensors]) -> float:
    """|B A - mean(B_i A_i)| / |mean|, in fp64."""
    mean = sum(w / sum(WEIGHTS) * t[B].double() @ t[A].double() for w, t in zip(WEIGHTS, trained, strict=True))
    return float((got[B].double() @ got[A].double() - mean).norm() / mean.norm())


def turned(noise: float) -> tuple[Tensors, list[Tensors]]:
    """Global factors, and silos that have learnt the same change in turned bases, up to noise."""
    theta = {A: draw(R, D_IN, seed=0), B: draw(D_OUT, R, seed=1)}
    learnt = {A: theta[A] + 0.5 * draw(R, D_IN, seed=2), B: theta[B] + 0.5 * draw(D_OUT, R, seed=3)}
    silos = []
    for i in range(3):
        q = turn(10 + i)
        silos.append(
            {
                A: q.t() @ learnt[A] + noise * draw(R, D_IN, seed=20 + i),
                B: learnt[B] @ q + noise * draw(D_OUT, R, seed=30 + i),
            }
        )
    return theta, silos


@pytest.mark.parametrize("round_", [1, 2], ids=["to A", "to B"])
def test_silos_that_differ_by_a_rotation_aggregate_exactly_when_turned(round_: int, tmp_path: Path) -> None:
    theta, silos = turned(0.0)
    assert error(aggregate("fedit", theta, silos, round_, tmp_path), silos) > 0.3
    assert error(aggregate("fedrot-lora", theta, silos, round_, tmp_path), silos) < 1e-6
    assert error(aggregate("fedrot-lora", theta, silos, round_, tmp_path, rotation=0.0), silos) > 0.3
    theta, silos = turned(0.2)
    rotated, averaged = (
        error(aggregate(name, theta, silos, round_, tmp_path), silos) for name in ("fedrot-lora", "fedit")
    )
    assert rotated < 0.3 * averaged


def test_turning_leaves_each_silos_change_and_round_0_alone() -> None:
    theta, silos = turned(0.1)
    algorithm = get_algorithm(AlgorithmSpec(name="fedrot-lora"))
    for round_ in range(3):
        update, _ = algorithm.local(theta, {}, Place(round=round_)).finish(silos[0])
        a, b = theta[A] + update[A], theta[B] + update[B]
        torch.testing.assert_close(b @ a, silos[0][B] @ silos[0][A], rtol=0, atol=1e-5)
        assert torch.allclose(a, silos[0][A], atol=1e-6) is (round_ == 0)


def test_the_reference_is_a_in_odd_rounds_and_b_in_even_ones() -> None:
    theta, silos = turned(0.1)
    algorithm = get_algorithm(AlgorithmSpec(name="fedrot-lora"))
    odd, even = (algorithm.local(theta, {}, Place(round=round_)).finish(silos[0])[0] for round_ in (1, 2))
    assert odd[A].norm() < even[A].norm() and even[B].norm() < odd[B].norm(), "each is nearest to its reference"


def test_the_rotation_is_procrustes_and_part_of_it_lies_between() -> None:
    """No other rotation, of many, brings a factor nearer; half way is orthogonal and half as far from the identity."""
    a, reference = draw(R, D_IN, seed=4), draw(R, D_IN, seed=5)
    q = aligning(a @ reference.t(), 1.0)
    best = (q.t() @ a - reference).norm()
    assert all((turn(s).t() @ a - reference).norm() > best for s in range(200))
    angle = torch.tensor(0.8)
    plane = torch.eye(R)
    plane[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    half = aligning(plane @ torch.diag(torch.arange(1.0, R + 1)), 0.5)
    torch.testing.assert_close(half @ half.t(), torch.eye(R), rtol=0, atol=1e-6)
    full = aligning(plane, 1.0)
    torch.testing.assert_close(full, plane, rtol=0, atol=1e-6)
    torch.testing.assert_close(aligning(plane, 0.5)[0, 0], (angle / 2).cos(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank_of_b", [0, 2, 4])
def test_the_svd_changes_factors_and_not_their_product(rank_of_b: int) -> None:
    a, b = draw(R, D_IN, seed=6), draw(D_OUT, rank_of_b, seed=7) @ draw(rank_of_b, R, seed=8)
    v, us = orthonormal(a, b)
    torch.testing.assert_close(us @ v, b @ a, rtol=0, atol=1e-5)
    torch.testing.assert_close(v @ v.t(), torch.eye(R), rtol=0, atol=1e-6)
    singular = torch.linalg.svdvals(b @ a)[:R]
    torch.testing.assert_close(us.norm(dim=0), singular, rtol=0, atol=1e-4)


def test_fedsvd_averages_b_first(tmp_path: Path) -> None:
    theta = {A: draw(R, D_IN, seed=0), B: draw(D_OUT, R, seed=1)}
    silos = [{A: theta[A], B: theta[B] + draw(D_OUT, R, seed=40 + i)} for i in range(3)]
    algorithm = get_algorithm(AlgorithmSpec(name="fedsvd"))
    accumulator = algorithm.accumulator(tmp_path)
    for silo, weight in zip(silos, WEIGHTS, strict=True):
        update, _ = algorithm.local(theta, {}, Place()).finish({B: silo[B]})
        assert set(update) == set(algorithm.expected_update(theta, Place(rank=R))) == {B}
        algorithm.fold(accumulator, update, weight, Place(rank=R))
    stepped, _ = algorithm.server_step(theta, accumulator, {}, Step(0, 3))
    assert error(stepped, silos) < 1e-6
    torch.testing.assert_close(stepped[A] @ stepped[A].t(), torch.eye(R), rtol=0, atol=1e-6)


def apart() -> tuple[Tensors, list[Tensors]]:
    """Global factors, and silos that have learnt different things from there."""
    theta = {A: draw(R, D_IN, seed=0) / 5, B: 0.2 * draw(D_OUT, R, seed=1)}
    silos = [
        {A: theta[A] + draw(R, D_IN, seed=50 + i) / 8, B: theta[B] + 0.3 * draw(D_OUT, R, seed=60 + i)}
        for i in range(3)
    ]
    return theta, silos


def test_the_correction_of_b_is_the_ridge_regressions(tmp_path: Path) -> None:
    """Where its gradient is 0, from the dense mean change; and the limits of lambda."""
    theta, silos = apart()
    p = [w / sum(WEIGHTS) for w in WEIGHTS]
    change = sum(w * t[B].double() @ t[A].double() for w, t in zip(p, silos, strict=True))
    mean = {n: sum(w * t[n].double() for w, t in zip(p, silos, strict=True)) for n in (A, B)}
    for strength in (1e-6, 0.01, 0.5, 1e6):
        got = aggregate("lora-fair", theta, silos, 1, tmp_path, fair_lambda=strength)
        torch.testing.assert_close(got[A].double(), mean[A], rtol=0, atol=1e-6)
        b, correction = got[B].double(), got[B].double() - mean[B]
        gradient = (b @ mean[A] - change) @ mean[A].t() + strength * correction
        assert gradient.norm() < 1e-5 * max(strength, 1) * mean[B].norm()
    torch.testing.assert_close(b, mean[B], rtol=0, atol=1e-5)
    best = change @ torch.linalg.pinv(mean[A])
    least = float((best @ mean[A] - change).norm() / change.norm())
    assert error(aggregate("lora-fair", theta, silos, 1, tmp_path, fair_lambda=1e-6), silos) == pytest.approx(
        least, 1e-3
    )


def test_the_correction_is_at_least_as_good_as_the_papers_sgd(tmp_path: Path) -> None:
    """Its own objective, 1 - cos(W, (B + dB) A) + 0.01 |dB|, minimised as it says: the cosine is no better than the
    closed form's, and the error, which the cosine does not see, is larger."""
    theta, silos = apart()
    p = [w / sum(WEIGHTS) for w in WEIGHTS]
    change = sum(w * t[B] @ t[A] for w, t in zip(p, silos, strict=True))
    mean = {n: sum(w * t[n] for w, t in zip(p, silos, strict=True)) for n in (A, B)}
    correction = torch.full_like(mean[B], 1e-4).requires_grad_()
    optimizer = torch.optim.SGD([correction], lr=0.01)
    for _ in range(1000):
        optimizer.zero_grad()
        loss = 1 - cosine(change, (mean[B] + correction) @ mean[A]) + 0.01 * correction.norm()
        loss.backward()
        optimizer.step()
    theirs = {A: mean[A], B: (mean[B] + correction).detach()}
    ours = aggregate("lora-fair", theta, silos, 1, tmp_path)
    fedit = aggregate("fedit", theta, silos, 1, tmp_path)
    assert (
        cosine(change, ours[B] @ ours[A]) >= cosine(change, theirs[B] @ theirs[A]) > cosine(change, mean[B] @ mean[A])
    )
    assert error(ours, silos) < error(theirs, silos) < error(fedit, silos)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)


@pytest.mark.parametrize("name", ["fedit", "ffa-lora", "fedrot-lora", "lora-fair", "fedsvd"])
def test_a_layer_is_the_mean_of_the_silos_that_trained_it(name: str, tmp_path: Path) -> None:
    """Silo 0 trains the first of two layers, the others both: as the first layer of all, and the second of two."""
    theta, silos = apart()
    second = {n: n.replace("layer.", "other.") for n in theta}
    both = theta | {second[n]: t for n, t in theta.items()}
    algorithm = get_algorithm(AlgorithmSpec(name=name))
    accumulator = algorithm.accumulator(tmp_path)
    for i, (factors, weight) in enumerate(zip(silos, WEIGHTS, strict=True)):
        trained = factors | ({} if i == 0 else {second[n]: t for n, t in factors.items()})
        update, _ = algorithm.local(both, {}, Place(round=1, rank=R)).finish(trained)
        expected = algorithm.expected_update(both, Place(round=1, rank=R))
        algorithm.fold(accumulator, {n: u for n, u in update.items() if n in expected}, weight, Place(rank=R))
    stepped, _ = algorithm.server_step(both, accumulator, {}, Step(1, 3))
    sent = set(algorithm.expected_update(theta, Place(round=1, rank=R)))
    for layer, names, of in (("layer", {n: n for n in theta}, slice(0, 3)), ("other", second, slice(1, 3))):
        alone = algorithm.accumulator(tmp_path)
        for factors, weight in zip(silos[of], WEIGHTS[of], strict=True):
            update, _ = algorithm.local(theta, {}, Place(round=1, rank=R)).finish(factors)
            algorithm.fold(alone, {n: u for n, u in update.items() if n in sent}, weight, Place(rank=R))
        wanted, _ = algorithm.server_step(theta, alone, {}, Step(1, 3))
        for n in theta:
            torch.testing.assert_close(stepped[names[n]], wanted[n], rtol=0, atol=1e-5, msg=f"{layer} {n}")
