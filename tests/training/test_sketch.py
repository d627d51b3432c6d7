"""Sketches of a model's full gradient against the dense gradient, and the directions that follow from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from fedlm.models.adapters import lora_layers
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.batches import batches
from fedlm.training.encode import TokenSet
from fedlm.training.forward import padded_nll
from fedlm.training.objective import sequences_of
from fedlm.training.sketch import LEFT, RIGHT, factors, random_matrices, sketch_gradient
from tests.training.helpers import sequence

KEY, RANK, SEED = (0, "silo-0000"), 3, 5


@pytest.fixture
def data() -> TokenSet:
    return TokenSet.of(sequence((1, 10), (i, 3 + i % 7), answer=2 + i % 3) for i in range(2, 22))


def dense(model: Any, data: TokenSet, spec: TrainingSpec) -> dict[str, Tensor]:
    """dL/dW of every LoRA layer's base weight [d_out, d_in], by autograd on unfrozen weights."""
    model = copy.deepcopy(model)
    weights = {name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()}
    for weight in weights.values():
        weight.requires_grad_()
    chosen = [data[i] for step in batches(spec, data.lengths, KEY, 0) for i in step]
    padded_nll(model, sequences_of(chosen)).mean().backward()
    return {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("changes", [{}, {"packing": False}, {"gradient_checkpointing": True}, {"micro_batch_size": 1}])
def test_a_sketch_is_that_of_the_dense_gradient_of_the_mean_loss(
    adapted: Any, data: TokenSet, changes: dict[str, Any]
) -> None:
    spec = TrainingSpec(**{"steps": 3, "batch_size": 6, "max_length": 64, **changes})
    gradients = dense(adapted, data, spec)
    events: list[Any] = []
    result, sketches = sketch_gradient(
        adapted, data, spec, RANK, seed=SEED, generator_key=KEY, observe=events.append, silo="a"
    )
    assert len(sketches) == 2 * len(gradients)
    for name, gradient in gradients.items():
        omega, psi = random_matrices(name, *gradient.shape, RANK, SEED)
        assert omega.shape[1] == len(psi) == 2 * RANK
        for got, wanted in (
            (sketches[f"{name}.{LEFT}"], gradient @ omega),
            (sketches[f"{name}.{RIGHT}"], psi @ gradient),
        ):
            torch.testing.assert_close(got, wanted, rtol=0, atol=float(1e-5 * wanted.abs().max()))
            assert got.dtype is torch.float32
    chosen = [data[i] for step in batches(spec, data.lengths, KEY, 0) for i in step]
    assert (result.steps, result.examples, len(events)) == (0, 18, 3)
    assert result.loss == pytest.approx(padded_nll(adapted, sequences_of(chosen)).mean().item(), rel=1e-5)
    assert result.target_tokens == sum(e.targets for e in chosen)
    assert all(p.grad is None for p in adapted.parameters())
    assert not any(layer._forward_hooks for layer in lora_layers(adapted).values()), "the hooks are gone"


def test_it_ends_early(adapted: Any, data: TokenSet) -> None:
    asked = iter([False, True])
    spec = TrainingSpec(steps=3, batch_size=6, max_length=64)
    stop = lambda: next(asked)  # noqa: E731
    result, _ = sketch_gradient(adapted, data, spec, RANK, seed=SEED, generator_key=KEY, should_stop=stop)
    assert result.examples == 6


def test_the_mean_of_sketches_is_the_sketch_of_the_mean_and_its_directions_are_nearly_the_best() -> None:
    """Three silos' gradients with singular values i^-1.5: more than 0.9 of the energy of the mean's truncated SVD; all
    of it where the mean has rank r."""
    generator = torch.Generator().manual_seed(0)
    d_out, d_in, r, p = 60, 90, 8, (0.5, 0.2, 0.3)

    def gradient(spectrum: Tensor) -> Tensor:
        u, v = (torch.linalg.qr(torch.randn(d, d_out, generator=generator))[0] for d in (d_out, d_in))
        return (u * spectrum) @ v.t()

    omega, psi = random_matrices("layer", d_out, d_in, r, SEED)
    for spectrum, at_least in ((torch.arange(1, 61.0) ** -1.5, 0.9), ((torch.arange(60) < r / 4).float(), 1 - 1e-5)):
        gradients = [gradient(spectrum) for _ in p]
        mean = sum(w * g for w, g in zip(p, gradients, strict=True))
        y = sum(w * (g @ omega) for w, g in zip(p, gradients, strict=True))
        z = sum(w * (psi @ g) for w, g in zip(p, gradients, strict=True))
        b, a = factors(y, z, r)
        torch.testing.assert_close(b.t() @ b, torch.eye(r), rtol=0, atol=1e-6)
        torch.testing.assert_close(a @ a.t(), torch.eye(r), rtol=0, atol=1e-6)
        best = torch.linalg.svdvals(mean)[:r].square().sum()
        assert (b.t() @ mean @ a.t()).square().sum() / best > at_least
