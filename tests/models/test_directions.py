"""Weights described by scalars: draws, order of terms, projection and its error, against closed forms."""

from __future__ import annotations

import pytest
import torch

from fedlm.errors import ModelError
from fedlm.messages import Tensors
from fedlm.models.directions import (
    BLOCK,
    COORDINATES,
    SCALARS,
    add_terms,
    direction,
    is_description,
    move,
    project,
)

SEED = 7


def weights(scale: float = 1.0) -> Tensors:
    """A matrix, a vector shorter than a vectorised draw, and a tensor of more than one block."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (30, 7), "b": (5,), "c": (BLOCK + 33,)}
    return {name: torch.randn(shape, generator=generator) * scale for name, shape in shapes.items()}


def flat(tensors: Tensors) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors.values()])


def z(number: int) -> torch.Tensor:
    zeros = {name: torch.zeros_like(t) for name, t in weights().items()}
    move(zeros, direction(SEED, number), 1.0)
    return flat(zeros).double()


def copied(tensors: Tensors) -> Tensors:
    return {name: t.clone() for name, t in tensors.items()}


def bits(tensors: Tensors) -> torch.Tensor:
    return flat(tensors).view(torch.int32)


def test_directions_are_standard_normal_and_unlike_one_another() -> None:
    one, other = z(0), z(1)
    d = len(one)
    assert abs(one.mean()) < 4 / d**0.5 and abs(one.var() - 1) < 4 * (2 / d) ** 0.5
    assert abs((one**4).mean() - 3) < 4 * (96 / d) ** 0.5
    assert abs(torch.dot(one, other) / d) < 4 / d**0.5
    assert abs(torch.dot(one[:-1], one[1:]) / d) < 4 / d**0.5, "blocks and tensors must not repeat one another"
    assert torch.equal(one, z(0))


def test_scalars_are_steps_against_their_directions_in_order() -> None:
    scalars = torch.tensor([0.03, 0.0, -0.7, 1e-4])
    found = weights()
    add_terms(found, {SCALARS: scalars}, SEED)
    expected = flat(weights()).double() - sum(a * z(i) for i, a in enumerate(scalars.double()))
    torch.testing.assert_close(flat(found).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "terms",
    [torch.tensor([0.3, -0.2, 0.7, 0.11]), torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(3))],
)
def test_going_on_from_earlier_terms_gives_the_bits_of_starting_over(terms: torch.Tensor) -> None:
    name = SCALARS if terms.ndim == 1 else COORDINATES
    whole, parts = weights(), weights()
    add_terms(whole, {name: terms}, SEED)
    add_terms(parts, {name: terms[:1]}, SEED)
    add_terms(parts, {name: terms[:3]}, SEED, done=1)
    assert not torch.equal(bits(whole), bits(parts))
    add_terms(parts, {name: terms}, SEED, done=3)
    assert torch.equal(bits(whole), bits(parts))


def test_another_seed_or_place_is_another_direction() -> None:
    first, seed, place = (weights() for _ in range(3))
    add_terms(first, {SCALARS: torch.tensor([0.5, 0.0])}, SEED)
    add_terms(seed, {SCALARS: torch.tensor([0.5, 0.0])}, SEED + 1)
    add_terms(place, {SCALARS: torch.tensor([0.0, 0.5])}, SEED)
    assert (flat(first) - flat(seed)).norm() > 1 and (flat(first) - flat(place)).norm() > 1


def test_descriptions_are_told_from_weights() -> None:
    assert is_description({SCALARS: torch.zeros(3)}) and is_description({COORDINATES: torch.zeros(0, 2, 1)})
    assert not is_description({}) and not is_description({"model.embed_tokens.weight": torch.zeros(3)})
    assert not is_description({SCALARS: torch.zeros(3), "w": torch.zeros(3)})


def reconstruction(delta: Tensors, number: int, blocks: int, per_block: int) -> torch.Tensor:
    """Delta~ of a difference, as silos rebuild it."""
    coordinates = torch.zeros(number + 1, blocks, per_block)
    coordinates[number] = project(delta, SEED, number, blocks, per_block)
    zeros = {name: torch.zeros_like(t) for name, t in delta.items()}
    add_terms(zeros, {COORDINATES: coordinates}, SEED, done=number)
    return flat(zeros).double()


def small_delta() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {"a": torch.randn(10, 7, generator=generator), "b": torch.randn(50, generator=generator) * 3}


@pytest.mark.parametrize("blocks, per_block", [(6, 1), (6, 4), (1, 8)])
def test_a_reconstruction_is_unbiased_and_its_error_is_d_over_k(blocks: int, per_block: int) -> None:
    """Over 1,500 draws of the bases: mean Delta~ = Delta, E|Delta~ - Delta|^2 = sum_l (d_l - 0.2)/K_l |Delta_l|^2.

    0.2 is 2 less the kurtosis of a uniform number, 1.8; it matters for blocks of 20 weights and never else.
    """
    delta, draws = small_delta(), 1500
    truth = flat(delta).double()
    found = torch.stack([reconstruction(delta, number, blocks, per_block) for number in range(draws)])
    squares = sum(
        (part.numel() - 0.2) / per_block * part.square().sum() for part in truth.view(blocks, -1)
    )  # 120 weights in equal blocks
    error = (found - truth).square().sum(1)
    assert abs(error.mean() / squares - 1) < 5 * float(error.std() / squares) / draws**0.5
    bias = (found.mean(0) - truth) / (found.std(0) / draws**0.5)
    assert bias.abs().max() < 4.5, "in units of its standard error, over 120 weights"


def test_the_reconstruction_error_falls_as_the_bases_grow() -> None:
    delta = small_delta()
    truth = flat(delta).double()
    relative = {}
    for k in (10, 30, 60, 120):
        errors = [(reconstruction(delta, n, k, 1) - truth).square().sum() / truth.square().sum() for n in range(100)]
        relative[k] = float(torch.stack(errors).mean())
    for k, found in relative.items():
        assert found == pytest.approx(max(120 / k - 0.2, 0.8), rel=0.15), relative


def test_blocks_cover_all_weights_whatever_their_number() -> None:
    for blocks in (1, 7, 119, 120):
        found = reconstruction(small_delta(), 0, blocks, 1)
        assert found.count_nonzero() == 120
    with pytest.raises(ModelError, match="120 weights cannot be cut into 121 blocks"):
        project(small_delta(), SEED, 0, 121, 1)


def test_moving_forth_and_back_restores_the_weights_to_two_units_in_the_last_place() -> None:
    before, eps = weights(0.05), 1e-3
    after = copied(before)
    for alpha in (eps, -2 * eps, eps):
        move(after, direction(SEED, 0), alpha)
    reach = torch.maximum(flat(before).abs(), eps * z(0).float().abs())
    unit = torch.nextafter(reach, torch.tensor(torch.inf)) - reach
    assert ((flat(after) - flat(before)).abs() <= 2 * unit).all()
