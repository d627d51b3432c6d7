"""Two processes that share each step end where one does; helpers that die are told, and replaced."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from fedlm.errors import TrainingError
from fedlm.models.adapters import adapter_parameters, attach, get_tensors, trainable
from fedlm.models.load import load_base
from fedlm.recipe.schema import AdapterSpec, ModelSpec, TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.loop import TrainResult, Window, train
from fedlm.training.parallel import Team
from tests.training.helpers import sequence

LORA, FULL = AdapterSpec(rank=4), AdapterSpec(kind="full")


@pytest.fixture(scope="module")
def data() -> TokenSet:
    """Examples of very different lengths and numbers of targets."""
    return TokenSet.of(sequence((i, 3 + 5 * (i % 9)), answer=2 + i % 3) for i in range(2, 40))


@pytest.fixture(scope="module")
def source(tiny_model_dir: Path) -> ModelSpec:
    return ModelSpec(source=str(tiny_model_dir), dtype="float32")


@pytest.fixture(scope="module")
def teams(source: ModelSpec) -> Iterator[dict[str, Team]]:
    made = {adapter.kind: Team(source, adapter, 0, 2, 1) for adapter in (LORA, FULL)}
    yield made
    for team in made.values():
        team.close()


def spec(**changes: Any) -> TrainingSpec:
    return TrainingSpec(**{"steps": 6, "batch_size": 7, "max_length": 64, "lr": 3e-4, **changes})


def learned(
    source: ModelSpec, adapter: AdapterSpec, data: TokenSet, s: TrainingSpec, team: Team | None, rule: Any = None
) -> tuple[TrainResult, torch.Tensor]:
    model = attach(load_base(source), adapter, 0)
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if ".lora_B." in name:
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    if team is not None:
        team.load({} if adapter.kind == "full" else get_tensors(model))
    result = train(model, trainable(model), data, s, Window(0, 1), generator_key=(0, "silo"), rule=rule, team=team)
    return result, torch.cat([p.detach().reshape(-1) for p in adapter_parameters(model).values()])


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 2},
        {"packing": False, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "clip_norm": None},
        {"batch_size": 1},
        {"gradient_checkpointing": True, "keep_optimizer": True, "spike_guard": 6.0},
    ],
    ids=["packed", "accumulated", "padded", "one-example", "checkpointed"],
)
def test_two_processes_end_where_one_does(
    source: ModelSpec, data: TokenSet, teams: dict[str, Team], adapter: AdapterSpec, changes: dict[str, Any]
) -> None:
    """To 1e-5 in every loss and weight. AdamW's rate is small here, since it divides rounding by rounding where a
    gradient is near zero: of two orders of sums in one process the weights differ as much."""
    s = spec(**changes)
    alone, weights = learned(source, adapter, data, s, None)
    shared, same = learned(source, adapter, data, s, teams[adapter.kind])
    np.testing.assert_allclose(alone.losses, shared.losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, same, atol=1e-5, rtol=0)
    assert abs(alone.losses[-1] - alone.losses[0]) > 1e-4
    counted = ("steps", "examples", "tokens", "target_tokens", "loss_count", "skipped")
    assert all(getattr(alone, name) == getattr(shared, name) for name in counted)
    assert alone.optimizer_state.keys() == shared.optimizer_state.keys()


def test_a_rule_s_changes_reach_the_helper(source: ModelSpec, data: TokenSet, teams: dict[str, Team]) -> None:
    class Rule:
        """Starts elsewhere, moves weights before a step and gradients before the optimiser."""

        def start(self) -> dict[str, torch.Tensor]:
            model = attach(load_base(source), LORA, 0)
            return {name: value + 0.01 for name, value in get_tensors(model).items()}

        def before(self, step: int, parameters: dict[str, Any]) -> None:
            with torch.no_grad():
                for parameter in parameters.values():
                    parameter.mul_(1 + 0.01 * step)

        def correct(self, parameters: dict[str, Any]) -> None:
            for parameter in parameters.values():
                parameter.grad.add_(parameter.detach(), alpha=0.1)

    s = spec(clip_norm=None, optimizer="sgd", lr=0.1)
    (alone, weights), (shared, same) = (learned(source, LORA, data, s, team, Rule()) for team in (None, teams["lora"]))
    np.testing.assert_allclose(alone.losses, shared.losses, atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, same, atol=1e-5, rtol=0)


def test_a_helper_that_is_killed_is_told_at_once(source: ModelSpec, data: TokenSet) -> None:
    team = Team(source, LORA, 0, 2, 1)

    class Rule:
        def start(self) -> dict[str, torch.Tensor]:
            return get_tensors(attach(load_base(source), LORA, 0))

        def before(self, step: int, parameters: dict[str, Any]) -> None:
            del parameters
            if step == 2:
                os.kill(team.helpers[0], signal.SIGKILL)

        def correct(self, parameters: dict[str, Any]) -> None:
            del parameters

    began = time.monotonic()
    with pytest.raises(TrainingError, match=r"a process that shares this silo's training ended \(signal SIGKILL\)"):
        learned(source, LORA, data, spec(), team, Rule())
    assert time.monotonic() - began < 10 and team.closed


@pytest.mark.slow
def test_a_fault_in_rank_0_leaves_no_helper(source: ModelSpec, data: TokenSet) -> None:
    team = Team(source, LORA, 0, 2, 1)
    (pid,) = team.helpers
    with pytest.raises(TrainingError, match="became"):
        learned(source, LORA, data, spec(lr=1e30, clip_norm=None, optimizer="sgd"), team)
    assert team.closed and not psutil.pid_exists(pid)


@pytest.mark.slow
def test_a_helper_that_cannot_load_the_model_is_told(source: ModelSpec) -> None:
    with pytest.raises(TrainingError, match=r"ended \(exit code 1\)"):
        Team(source.model_copy(update={"source": "/nowhere"}), LORA, 0, 2, 1)
