"""The zeroth-order loop against quadratics, autograd's directional derivatives and the first-order loop's batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Module

from fedlm.errors import TrainingError
from fedlm.models.directions import move
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.forward import batch_nll
from fedlm.training.loop import Window, train
from fedlm.training.schedule import learning_rate
from fedlm.training.sequences import Encoded
from fedlm.training.zeroth import projected_gradient, train_zeroth
from tests.training.helpers import learnt

EPS = 1e-3


def generator(step: int) -> torch.Generator:
    return torch.Generator().manual_seed(1000 + step)


def drawn(like: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
    """z of a step, by name."""
    zeros = {name: torch.zeros_like(t) for name, t in like.items()}
    move(zeros, generator(step), 1.0)
    return zeros


def values(model: Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def go(model: Module, data: TokenSet, spec: TrainingSpec, stride: Any, **options: Any) -> Any:
    parameters = options.pop("weights", learnt(model))
    return train_zeroth(
        model,
        parameters,
        data,
        spec,
        Window(0, 1),
        generator_key=(0, "silo"),
        eps=EPS,
        direction=options.pop("direction", generator),
        stride=stride,
        **options,
    )


def test_the_estimate_is_the_slope_of_a_quadratic_and_its_mean_the_gradient() -> None:
    """On f = (w - b)' A (w - b) / 2 the two-point difference is <gradient, z> without any O(eps^2): g z has the
    gradient for its mean over z."""
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=rng, dtype=torch.float64)
    A, b = root @ root.T / 12, torch.randn(12, generator=rng, dtype=torch.float64)  # noqa: N806
    w = {"x": torch.randn(3, 2, generator=rng, dtype=torch.float64), "y": torch.randn(6, generator=rng).double()}

    def point() -> torch.Tensor:
        return torch.cat([t.flatten() for t in w.values()]) - b

    gradient, draws = A @ point(), 10_000
    estimates = torch.zeros(draws, 12, dtype=torch.float64)
    start = {name: t.clone() for name, t in w.items()}
    for step in range(draws):
        slope, mean = projected_gradient(w, lambda s=step: generator(s), EPS, lambda: float(point() @ A @ point() / 2))
        for name in w:
            w[name].copy_(start[name])
        z = torch.cat([t.flatten() for t in drawn(w, step).values()])
        if step < 100:
            assert slope == pytest.approx(float(gradient @ z), rel=1e-7, abs=1e-9)
            curved = float(point() @ A @ point() / 2 + EPS**2 * (z @ A @ z) / 2)
            assert mean == pytest.approx(curved, rel=1e-9)
        estimates[step] = slope * z
    away = (estimates.mean(0) - gradient) / (estimates.std(0) / draws**0.5)
    assert away.abs().max() < 4.5, "in units of the standard error"


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_slope_is_autograds_directional_derivative(
    base: Any, adapted: Module, sequences: list[Encoded], kind: str, packing: bool
) -> None:
    model = adapted if kind == "lora" else base.requires_grad_(True)
    spec = TrainingSpec(max_length=256, steps=1, batch_size=8, packing=packing, lr=1e-3)  # every sequence once
    slopes: list[float] = []

    def stride(step: int, slope: float, rate: float) -> float:  # noqa: ARG001
        slopes.append(slope)
        return 0.0

    for number in range(4):
        result = go(model, TokenSet.of(sequences), spec, stride, direction=lambda _, n=number: generator(n))
    model.zero_grad()
    padded = spec.model_copy(update={"packing": False})  # another way to the loss
    nll = batch_nll(model, sequences, padded)
    nll.mean().backward()
    for step, slope in enumerate(slopes):
        z = drawn(learnt(model), step)
        exact = sum(float((p.grad.double() * z[n]).sum()) for n, p in learnt(model).items() if p.grad is not None)
        assert slope == pytest.approx(exact, rel=0.02, abs=0.02)
    assert result.losses[0] == pytest.approx(float(nll.mean()), rel=1e-3)


def test_steps_go_where_the_rule_says_and_nothing_else_moves(adapted: Module, sequences: list[Encoded]) -> None:
    """w <- w - lr g z with the schedule's rate, the frozen weights to the bit, and no gradient left behind."""
    spec = TrainingSpec(max_length=256, steps=5, batch_size=3, lr=0.01, schedule="linear", warmup=0.2)
    before, moved = values(adapted), {name: torch.zeros_like(p) for name, p in learnt(adapted).items()}

    def stride(step: int, slope: float, rate: float) -> float:
        assert rate == pytest.approx(learning_rate(spec, step / 5))
        for name, z in drawn(learnt(adapted), step).items():
            moved[name] -= rate * slope * z
        return -rate * slope

    result = go(adapted, TokenSet.of(sequences), spec, stride)
    assert result.steps == 5 and len(result.losses) == 5 and result.optimizer_state == {}
    for name, p in adapted.named_parameters():
        assert p.grad is None
        if name in moved:
            torch.testing.assert_close(p.detach(), before[name] + moved[name], rtol=0, atol=2e-6)
            assert moved[name].abs().max() > 1e-4
        else:
            assert torch.equal(p, before[name])


def test_batches_tokens_and_schedule_are_those_of_first_order_training(base: Any, sequences: list[Encoded]) -> None:
    """A vanishing rate leaves the weights: both loops then measure the same losses on the same batches."""
    spec = TrainingSpec(max_length=256, epochs=1.5, batch_size=3, lr=1e-12, optimizer="sgd", schedule="constant")
    base.requires_grad_(True)
    data = TokenSet.of(sequences)
    first = train(base, learnt(base), data, spec, Window(0, 1), generator_key=(0, "silo"), rule=None)
    zeroth = go(base, data, spec, lambda step, slope, rate: 0.0)  # noqa: ARG005
    for figure in ("steps", "examples", "tokens", "target_tokens"):
        assert getattr(first, figure) == getattr(zeroth, figure)
    assert zeroth.losses == pytest.approx(first.losses, rel=1e-3)
    assert zeroth.loss == pytest.approx(first.loss, rel=1e-3)


def test_perturbing_does_not_drift(base: Any, sequences: list[Encoded]) -> None:
    """40 steps that go nowhere: at most two units in the last place each."""
    base.requires_grad_(True)
    before = values(base)
    go(base, TokenSet.of(sequences), TrainingSpec(max_length=256, steps=40, batch_size=1), lambda *_: 0.0)
    for name, p in base.named_parameters():
        reach = before[name].abs().clamp_min(EPS * 6)
        unit = torch.nextafter(reach, torch.tensor(torch.inf)) - reach
        assert ((p - before[name]).abs() <= 80 * unit).all(), name


def test_dropout_is_off_and_the_models_mode_comes_back(adapted: Module, sequences: list[Encoded]) -> None:
    for module in adapted.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    spec, losses = TrainingSpec(max_length=256, steps=2, batch_size=8), []
    adapted.train()
    for _ in range(2):
        losses.append(go(adapted, TokenSet.of(sequences), spec, lambda *_: 0.0).losses)
        assert adapted.training
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_it_stops_when_told_and_reports_every_step(adapted: Module, sequences: list[Encoded]) -> None:
    seen: list[dict[str, Any]] = []
    spec = TrainingSpec(max_length=256, steps=9, batch_size=2)
    result = go(
        adapted,
        TokenSet.of(sequences),
        spec,
        lambda *_: 0.0,
        observe=seen.append,
        silo="s",
        should_stop=lambda: len(seen) == 3,
    )
    assert result.steps == 3 and [e["step"] for e in seen] == [0, 1, 2]
    assert seen[0]["kind"] == "step" and seen[0]["silo"] == "s" and seen[0]["steps"] == 9


def test_bad_input_is_said(adapted: Module, sequences: list[Encoded]) -> None:
    spec = TrainingSpec(max_length=256, steps=1, batch_size=2)
    with pytest.raises(TrainingError, match="nothing to train on"):
        go(adapted, TokenSet.of([]), spec, lambda *_: 0.0)
    with pytest.raises(TrainingError, match="256 positions"):
        go(adapted, TokenSet.of(sequences), TrainingSpec(steps=1, max_length=512), lambda *_: 0.0)
    with torch.no_grad():
        next(iter(learnt(adapted).values())).fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"the loss became nan at step 0.*zo_eps"):
        go(adapted, TokenSet.of(sequences), spec, lambda *_: 0.0, silo="s")
