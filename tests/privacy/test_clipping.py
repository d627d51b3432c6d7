"""Norms stay within bounds after rounding; the adaptive bound follows its closed form and its quantile."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedlm.errors import PrivacyError
from fedlm.privacy.accounting import spent
from fedlm.privacy.adaptive_clipping import AdaptiveClipping
from fedlm.privacy.clipping import clip, l2_norm
from fedlm.privacy.mechanisms import Gaussian


def test_within_the_bound_nothing_changes() -> None:
    update = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    found = clip(update, 5.0)
    assert found.within and found.norm == 5.0
    assert all(torch.equal(found.tensors[name], update[name]) for name in update)


def test_scaled_over_all_tensors_together() -> None:
    found = clip({"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}, 1.0)
    assert not found.within and found.norm == 5.0
    torch.testing.assert_close(found.tensors["a"], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(found.tensors["b"], torch.tensor([[0.8]]))


def test_never_above_the_bound() -> None:
    """Rounding to fp32 lifts about half of all norms above the bound, were it not for the last check."""
    generator = torch.Generator().manual_seed(0)
    lifted = 0
    for i in range(300):
        update = {"a": torch.randn(50, generator=generator) * 10, "b": torch.randn(3, 7, generator=generator) * 1e3}
        bound = 0.1 + 0.013 * i
        found = clip(update, bound)
        assert l2_norm(found.tensors) <= bound
        assert l2_norm(found.tensors) == pytest.approx(bound, rel=1e-6)
        naive = {name: tensor * (bound / found.norm) for name, tensor in update.items()}
        lifted += l2_norm(naive) > bound
    assert lifted > 50


def test_norms_beyond_fp32() -> None:
    """Squares of these overflow, or vanish, in fp32."""
    assert l2_norm(clip({"a": torch.full((4,), 1e30)}, 2.0).tensors) == pytest.approx(2.0, rel=1e-6)
    assert clip({"a": torch.full((4,), 1e-30)}, 1.0).norm == pytest.approx(2e-30, rel=1e-6)
    assert clip({"a": torch.ones(2, dtype=torch.bfloat16)}, 9.0).tensors["a"].dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_unbounded_updates_are_refused(bad: float) -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        clip({"a": torch.tensor([1.0, bad])}, 1.0)


def test_other_input_is_refused() -> None:
    with pytest.raises(PrivacyError, match="int64"):
        clip({"a": torch.tensor([1])}, 1.0)
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PrivacyError, match="bound"):
            clip({"a": torch.tensor([1.0])}, bound)


def test_sum_and_count_together_cost_what_was_asked_for() -> None:
    """z_delta of theorem 1: both Gaussians composed have z^-2 = z_delta^-2 + (2 sigma_b)^-2."""
    rule = AdaptiveClipping(count_noise=5.0)
    z = 1.1
    z_update = rule.update_noise(z)
    assert z_update == pytest.approx((1.1**-2 - 10.0**-2) ** -0.5)
    assert z_update > z
    # A count of +-1/2 has a bound of 1/2: its noise multiplier is sigma_b / (1/2).
    both = spent([Gaussian("user", "zero-out", z_update), Gaussian("user", "zero-out", 5.0 / 0.5)], 1e-5).epsilon
    assert both == pytest.approx(spent([Gaussian("user", "zero-out", z)], 1e-5).epsilon, rel=1e-9)


def test_steps_follow_the_closed_form() -> None:
    """With all units within, or none, the bound falls or grows by exp(-+ rate (..)): a geometric series."""
    rule = AdaptiveClipping(count_noise=1.0, quantile=0.8, rate=0.2)
    falling = growing = 1.0
    for _ in range(10):
        falling = rule.step(falling, 50 * rule.indicator(True), 50)
        growing = rule.step(growing, 50 * rule.indicator(False), 50)
    assert falling == pytest.approx(math.exp(-10 * 0.2 * 0.2))
    assert growing == pytest.approx(math.exp(10 * 0.2 * 0.8))


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 100.0])
def test_the_quantile_is_tracked(quantile: float, start: float) -> None:
    """Norms are log-normal; after 450 rounds with noise the bound lies at their quantile, within 10 %."""
    random = np.random.default_rng(1)
    units = 400
    rule = AdaptiveClipping(count_noise=units / 20, quantile=quantile)
    bound, bounds = start, []
    for _ in range(450):
        norms = np.exp(random.standard_normal(units) * 0.5)
        count = sum(rule.indicator(within) for within in (norms <= bound).tolist()) + random.normal(0, rule.count_noise)
        bound = rule.step(bound, float(count), units)
        bounds.append(bound)
    wanted = float(np.quantile(np.exp(np.random.default_rng(2).standard_normal(100_000) * 0.5), quantile))
    assert np.exp(np.mean(np.log(bounds[-50:]))) == pytest.approx(wanted, rel=0.1)


def test_a_count_that_costs_everything_is_refused() -> None:
    with pytest.raises(PrivacyError, match="whole budget"):
        AdaptiveClipping(count_noise=0.5).update_noise(1.0)
    for fields in ({"count_noise": 0.0}, {"count_noise": 1.0, "quantile": 1.0}, {"count_noise": 1.0, "rate": 0.0}):
        with pytest.raises(PrivacyError):
            AdaptiveClipping(**fields)
    with pytest.raises(PrivacyError, match="no step"):
        AdaptiveClipping(1.0).step(1.0, float("nan"), 10)
