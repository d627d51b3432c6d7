"""Steps that leap are left out, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedlm.recipe.schema import TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.loop import SPIKES, TrainResult, Window, train
from fedlm.training.objective import Likelihood, Tools
from fedlm.training.sequences import Example
from fedlm.training.spikes import LEAST, WINDOW, SpikeGuard
from tests.training.helpers import learnt, sequence

KEY = (0, "silo-0000")


@pytest.fixture(scope="module")
def data() -> TokenSet:
    return TokenSet.of(sequence((i, 4 + i % 3), answer=3) for i in range(2, 40))


class Spiked(Likelihood):
    """The loss of one step is a hundred times itself."""

    def __init__(self, tools: Tools, at: int | None) -> None:
        super().__init__(tools)
        self.at, self.step = at, -1

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        self.step += 1
        return super().begin(examples)

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        terms, divisor = super().terms(part)
        return (terms * 100 if self.step == self.at else terms), divisor


def fit(
    model: Any, data: TokenSet, guard: float | None, at: int | None, steps: int = 90, **more: Any
) -> tuple[TrainResult, Tensor]:
    model = copy.deepcopy(model)
    spec = TrainingSpec(
        steps=steps, batch_size=4, max_length=64, lr=1e-3, clip_norm=None, schedule="constant", spike_guard=guard
    )
    objective = Spiked(Tools(model, spec), at)
    window = Window(0, 1)
    result = train(model, learnt(model), data, spec, window, generator_key=KEY, rule=None, objective=objective, **more)
    return result, torch.cat([p.detach().reshape(-1) for p in learnt(model).values()])


def test_a_spike_is_skipped_and_training_goes_on_as_if_it_had_not_been(adapted: Any, data: TokenSet) -> None:
    still, clean = fit(adapted, data, None, None)
    guarded, kept = fit(adapted, data, 6.0, 75)
    hurt, lost = fit(adapted, data, None, 75)
    assert guarded.skipped == [75] and guarded.figures["skipped_steps"] == (1.0, 90.0)
    assert guarded.losses[:75] == still.losses[:75] and guarded.losses[75] == pytest.approx(100 * still.losses[75])
    assert (kept - clean).norm() < 0.2 * (lost - clean).norm()
    assert np.abs(np.subtract(guarded.losses[76:], still.losses[76:])).max() < 0.1
    assert not hurt.skipped and "skipped_steps" not in hurt.figures


def test_without_a_spike_no_bit_changes(adapted: Any, data: TokenSet) -> None:
    (plain, weights), (guarded, same) = fit(adapted, data, None, None), fit(adapted, data, 6.0, None)
    assert torch.equal(weights, same) and plain.losses == guarded.losses and guarded.skipped == []


def test_what_it_remembers_goes_on_over_rounds_bit_for_bit() -> None:
    draw = np.random.default_rng(0)
    values = [(float(a), float(b)) for a, b in draw.lognormal(size=(200, 2))] + [(50.0, 1.0), (1.0, 50.0)]
    whole, cut = SpikeGuard(6.0), SpikeGuard(6.0)
    for number, pair in enumerate(values):
        if number % 16 == 0:
            cut = SpikeGuard(6.0, cut.state)
        assert whole.leaps(*pair) == cut.leaps(*pair)
    assert torch.equal(whole.state, cut.state) and whole.state.shape == (WINDOW, 2)


def test_loss_and_norm_each_suffice_and_the_beginning_and_a_new_level_are_let_through() -> None:
    guard = SpikeGuard(3.0)
    assert not any(guard.leaps(1.0 + n % 2, 2.0 + n % 2) for n in range(LEAST - 1))
    assert not SpikeGuard(3.0, guard.state).leaps(1e9, 1e9), "too few steps to judge by"
    assert not guard.leaps(1.0, 2.0)
    for loss, norm, leaps in ((1e9, 2.0, True), (1.0, 1e9, True), (-1e9, 0.0, False), (2.0, 3.0, False)):
        assert SpikeGuard(3.0, guard.state).leaps(loss, norm) is leaps
    outcomes = [guard.leaps(50.0 + n % 2, 2.0) for n in range(2 * WINDOW)]
    assert outcomes[0] and not any(outcomes[WINDOW:]), "a lasting level becomes the usual one"


def test_moments_and_memory_are_kept_together(adapted: Any, data: TokenSet) -> None:
    spec = TrainingSpec(steps=3, batch_size=4, max_length=64, keep_optimizer=True, spike_guard=6.0)
    model = copy.deepcopy(adapted)

    def once(state: Any) -> TrainResult:
        return train(
            model, learnt(model), data, spec, Window(0, 1), generator_key=KEY, rule=None, optimizer_state=state
        )

    first = once(None)
    assert first.optimizer_state[SPIKES].shape == (3, 2) and first.optimizer_state[SPIKES].dtype == torch.float64
    second = once(first.optimizer_state)
    assert torch.equal(second.optimizer_state[SPIKES][:3], first.optimizer_state[SPIKES])
    assert len(first.optimizer_state) == 1 + 3 * len(learnt(model))
