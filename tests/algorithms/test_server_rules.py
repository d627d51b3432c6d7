"""The server optimisers against torch.optim on the pseudo-gradient -mean(u_i), and FedYogi against its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedlm.algorithms import get_algorithm
from fedlm.algorithms.base import Accumulator, Place, Step
from fedlm.errors import RecipeError, RunError
from fedlm.recipe.schema import AdapterSpec, AlgorithmSpec

ROUNDS, N = 25, 64


def pseudo_updates() -> list[list[torch.Tensor]]:
    """Three silos' updates for each round, of very different sizes from element to element."""
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** torch.linspace(-3, 0, N)
    return [[torch.randn(N, generator=generator) * scale for _ in range(3)] for _ in range(ROUNDS)]


def mean(updates: list[torch.Tensor]) -> torch.Tensor:
    """Weighted 1, 2, 3 as in `trajectory`, in float64."""
    return (sum((i + 1) * u.double() for i, u in enumerate(updates)) / 6).float()


def trajectory(spec: AlgorithmSpec) -> list[torch.Tensor]:
    algorithm = get_algorithm(spec)
    theta = {"w": torch.linspace(-1, 1, N)}
    state = algorithm.init_state(theta)
    models = []
    for updates in pseudo_updates():
        accumulator = algorithm.accumulator(Path())
        for i, u in enumerate(updates):
            algorithm.fold(accumulator, {"w": u}, i + 1.0, Place())
        before = theta["w"].clone()
        new, state = algorithm.server_step(theta, accumulator, state, Step(0, 3))
        assert torch.equal(theta["w"], before), "the round's model must survive the step"
        theta = new
        models.append(theta["w"])
    return models


def reference(
    optimizer: torch.optim.Optimizer, w: torch.nn.Parameter, before_step: Callable[[int], None] | None = None
) -> list[torch.Tensor]:
    models = []
    for t, updates in enumerate(pseudo_updates(), start=1):
        w.grad = -mean(updates)
        if before_step:
            before_step(t)
        optimizer.step()
        models.append(w.detach().clone())
    return models


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert (ours[-1] - ours[0]).abs().max() > 1e-2


@pytest.mark.parametrize("momentum, rate", [(0.9, 1.0), (0.5, 0.1), (0.0, 1.0)])
def test_fedavgm_is_torchs_sgd_with_momentum(momentum: float, rate: float) -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, N))
    optimizer = torch.optim.SGD([w], lr=rate, momentum=momentum)
    ours = trajectory(AlgorithmSpec(name="fedavgm", server_momentum=momentum, server_lr=rate))
    same(ours, reference(optimizer, w))


@pytest.mark.parametrize("momentum, rate", [(0.9, 0.7), (0.5, 0.1), (0.0, 1.0)])
def test_diloco_is_torchs_sgd_with_nesterov_momentum(momentum: float, rate: float) -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, N))
    optimizer = torch.optim.SGD([w], lr=rate, momentum=momentum, nesterov=momentum > 0)
    ours = trajectory(AlgorithmSpec(name="diloco", server_momentum=momentum, server_lr=rate))
    same(ours, reference(optimizer, w))


def test_fedadagrad_is_torchs_adagrad_started_at_tau_squared() -> None:
    """torch adds eps outside the root as the paper does tau; beta1 = 0 as in the paper's experiments."""
    tau = 1e-2
    w = torch.nn.Parameter(torch.linspace(-1, 1, N))
    optimizer = torch.optim.Adagrad([w], lr=0.1, eps=tau, initial_accumulator_value=tau**2)
    same(
        trajectory(AlgorithmSpec(name="fedadagrad", server_momentum=0.0, tau=tau, server_lr=0.1)),
        reference(optimizer, w),
    )


def test_fedadam_is_torchs_adam_without_bias_correction() -> None:
    """torch steps by lr (m / (1 - beta1^t)) / (sqrt(v) / s + eps) with s = sqrt(1 - beta2^t).

    So lr = eta (1 - beta1^t) / s and eps = tau / s give the paper's eta m / (sqrt(v) + tau).
    """
    eta, tau, beta1, beta2 = 0.1, 1e-2, 0.9, 0.99
    w = torch.nn.Parameter(torch.linspace(-1, 1, N))
    optimizer = torch.optim.Adam([w], lr=eta, betas=(beta1, beta2), eps=tau)
    optimizer.state[w] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros(N),
        "exp_avg_sq": torch.full((N,), tau**2),
    }

    def undo_bias_correction(t: int) -> None:
        s = math.sqrt(1 - beta2**t)
        optimizer.param_groups[0].update(lr=eta * (1 - beta1**t) / s, eps=tau / s)

    same(
        trajectory(AlgorithmSpec(name="fedadam", tau=tau, server_lr=eta, server_momentum=beta1, beta2=beta2)),
        reference(optimizer, w, undo_bias_correction),
    )


def test_fedyogi_is_the_papers_formula() -> None:
    eta, tau, beta1, beta2 = 0.1, 1e-2, 0.9, 0.99
    x = np.linspace(-1, 1, N)
    m, v = np.zeros(N), np.full(N, tau**2)
    theirs = []
    for updates in pseudo_updates():
        delta = mean(updates).double().numpy()
        m = beta1 * m + (1 - beta1) * delta
        v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        x = x + eta * m / (np.sqrt(v) + tau)
        theirs.append(torch.from_numpy(x).float())
    same(trajectory(AlgorithmSpec(name="fedyogi", tau=tau, server_lr=eta, server_momentum=beta1, beta2=beta2)), theirs)


def test_the_three_adaptive_rules_differ() -> None:
    ends = [trajectory(AlgorithmSpec(name=n))[-1] for n in ("fedadam", "fedyogi", "fedadagrad")]
    assert all((a - b).abs().max() > 1e-4 for a, b in [(ends[0], ends[1]), (ends[1], ends[2]), (ends[0], ends[2])])


def test_default_server_rates() -> None:
    names = ("fedavg", "fedavgm", "scaffold", "fedyogi", "fedadagrad")
    for kind, adaptive in (("full", (1e-3, 1e-3)), ("lora", (5e-3, 3e-2)), ("ia3", (5e-3, 3e-2))):
        adapter = AdapterSpec(kind=kind)
        rates = [get_algorithm(AlgorithmSpec(name=n), adapter).server_lr for n in names]
        assert rates == [1.0, 1.0, 1.0, *adaptive]
    assert get_algorithm(AlgorithmSpec(name="fedadam", server_lr=0.5)).server_lr == 0.5
    outer = [get_algorithm(AlgorithmSpec(name=n)) for n in ("diloco", "streaming-diloco", "eager-diloco")]
    assert {(a.server_lr, a.spec.server_momentum) for a in outer} == {(0.7, 0.9)}


@pytest.mark.parametrize("field", ["server_momentum", "beta2"])
def test_a_beta_of_one_is_refused(field: str) -> None:
    with pytest.raises(RecipeError, match=f"{field} = 1"):
        get_algorithm(AlgorithmSpec(name="fedadam", **{field: 1.0}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_updates_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """Nine updates of 2048.0 summed in fp16 average to 2050 (Flower's fault): the sum rounds to multiples of 16."""
    accumulator = Accumulator()
    for _ in range(9):
        accumulator.add({"w": torch.full((5,), 2048.0, dtype=dtype)}, 1.0)
    (_, average), *_ = accumulator.mean()
    assert average.dtype is torch.float32
    assert torch.equal(average, torch.full((5,), 2048.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_layout_of_an_update_does_not_change_the_bits(dtype: torch.dtype) -> None:
    """Tensors of their own, views of one buffer, transposed tensors, another order of names, more than one block."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"b": (3, 7), "a": (400, 401), "c": (5,), "d": ()}
    apart = [{k: torch.randn(s, generator=generator).to(dtype) for k, s in shapes.items()} for _ in range(3)]
    together = []
    for update in apart:
        buffer = torch.cat([update[k].flatten() for k in sorted(shapes)])
        pieces = buffer.split([update[k].numel() for k in sorted(shapes)])
        together.append({k: p.view(shapes[k]) for k, p in zip(sorted(shapes), pieces, strict=True)})
    turned = [{k: u[k].t().contiguous().t() if u[k].dim() == 2 else u[k] for k in reversed(u)} for u in apart]
    sums = []
    for updates in (apart, together, turned):
        accumulator = Accumulator()
        for i, update in enumerate(updates):
            accumulator.add(update, 1234.567 * (i + 1))
        sums.append(accumulator.total)
    for name in shapes:
        assert torch.equal(sums[0][name], sums[1][name]) and torch.equal(sums[0][name], sums[2][name])
    exact = sum(1234.567 * (i + 1) * u["a"].double() for i, u in enumerate(apart))
    torch.testing.assert_close(sums[0]["a"].double(), exact, rtol=1e-5, atol=1e-2)


def test_updates_are_not_changed_or_kept() -> None:
    accumulator = Accumulator()
    update = {"w": torch.ones(4)}
    accumulator.add(update, 2.0)
    accumulator.add(update, 3.0)
    list(accumulator.mean())
    assert torch.equal(update["w"], torch.ones(4))
    assert accumulator.total["w"].data_ptr() != update["w"].data_ptr()


def test_nothing_folded_has_no_mean() -> None:
    with pytest.raises(RunError, match="no silo's update"):
        list(Accumulator().mean())
