"""The private loop against Opacus' optimiser, against plain training where it must be that, and its noise."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from scipy import stats
from torch import Tensor

from fedlm.algorithms.base import Place
from fedlm.algorithms.fedprox import Proximal
from fedlm.algorithms.scaffold import VARIATE, ControlVariates
from fedlm.errors import TrainingError
from fedlm.models.adapters import trainable
from fedlm.privacy.cycle import CorrelatedNoise, plan
from fedlm.privacy.matrix import banded_square_root
from fedlm.recipe.preference import PreferenceSpec
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.forward import padded_nll
from fedlm.training.loop import TrainResult, Window, make_optimizer
from fedlm.training.objective import Likelihood, Tools
from fedlm.training.private.loop import Mechanism, PrivateResult, train_private
from fedlm.training.private.losses import example_losses
from fedlm.training.private.sampling import poisson_batches
from fedlm.training.schedule import learning_rate
from fedlm.training.tasks.preference import PreferenceObjective
from tests.training.private.helpers import made, pairs, task, texts

KEY = (0, "silo-0000")


def spec(**changes: Any) -> TrainingSpec:
    given = {"steps": 1, "max_length": 64, "lr": 0.1, "clip_norm": None, "optimizer": "sgd", "schedule": "constant"}
    return TrainingSpec.model_validate({**given, **changes})


def mechanism(**changes: Any) -> Mechanism:
    return Mechanism(**{"clip": 0.5, "noise": 1.0, "rate": 0.5, "expected": 3.0, "steps": 3, **changes})


def normal(seed: int = 7) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda _, shape, std: torch.normal(0.0, std, shape, generator=generator)


def fit(model: Any, m: Mechanism, s: TrainingSpec | None = None, **more: Any) -> PrivateResult:
    given = {"draws": np.random.default_rng(5), "noise": normal(), "generator_key": KEY, **more}
    data = given.pop("data", None) or TokenSet.of(texts(8))
    return train_private(model, trainable(model), data, s or spec(), given.pop("window", Window(0, 1)), m, **given)


def values(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainable(model).items()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_equals_opacus(optimizer: str, base: Any) -> None:
    """The same batches and the same noise through Opacus' GradSampleModule and DPOptimizer: 3 steps of LoRA."""
    model = made(base, "lora")
    other = copy.deepcopy(model)
    s = spec(optimizer=optimizer, lr=1e-2, schedule="linear", weight_decay=0.01, momentum=0.9)
    result = fit(model, mechanism(), s, window=Window(1, 3))
    parameters, data = trainable(other), texts(8)
    inner = make_optimizer(s, parameters)
    watched = GradSampleModule(other, loss_reduction="mean")
    private = DPOptimizer(
        inner,
        noise_multiplier=1.0,
        max_grad_norm=0.5,
        expected_batch_size=3,
        generator=torch.Generator().manual_seed(7),
    )
    sizes = []
    for step, chosen in enumerate(poisson_batches(8, 0.5, 3, np.random.default_rng(5))):
        inner.param_groups[0]["lr"] = learning_rate(s, (3 + step) / 9)
        some = [data[i] for i in chosen]
        example_losses(Likelihood(Tools(other, TrainingSpec(steps=1, packing=False))), some).mean().backward()  # type: ignore[no-untyped-call]
        private.step()
        private.zero_grad()
        sizes.append(len(some))
    watched.remove_hooks()
    assert min(sizes) > 0 and len(set(sizes)) > 1, "the divisor differs from what is drawn"
    assert result.examples == sum(sizes) and result.steps == 3
    assert furthest(values(model), values(other)) < (1e-5 if optimizer == "sgd" else 1e-4)


@pytest.mark.parametrize("kind", ["lora", "prefix"])
def test_without_noise_and_clip_it_is_the_mean_over_examples(kind: str, base: Any) -> None:
    """Sigma 0, C infinite, everybody in every step: plain SGD on the mean of the examples' mean losses."""
    model = made(base, kind)
    plain = copy.deepcopy(model)
    result = fit(model, mechanism(clip=float("inf"), noise=0.0, rate=1.0, expected=8.0))
    parameters = list(trainable(plain).values())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    losses = []
    for _ in range(3):
        loss = torch.stack([padded_nll(plain, e.sequences).mean() for e in texts(8)]).mean()
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-5) and losses[-1] < losses[0]
    assert furthest(values(model), values(plain)) < 1e-5


def test_an_empty_batch_is_a_step_of_noise_of_the_right_size(base: Any) -> None:
    """Nobody drawn: the parameters move by -lr N(0, sigma^2 C^2) / expected (chi-square and normality, p > 1e-3)."""
    model = made(base, "full")
    before = values(model)
    m = mechanism(rate=1e-9, noise=2.0, clip=0.3, expected=4.0, steps=1)
    result = fit(model, m)
    assert (result.steps, result.examples, result.losses) == (1, 0, [0.0])
    moved = torch.cat([(before[n] - v).flatten() for n, v in values(model).items()]).double().numpy()
    z = moved / (0.1 * 2.0 * 0.3 / 4.0)
    assert len(z) > 100_000
    assert min(stats.chi2(len(z)).cdf((z**2).sum()), stats.chi2(len(z)).sf((z**2).sum())) > 1e-3
    assert stats.kstest(z, "norm").pvalue > 1e-3


def test_divided_by_what_is_expected(base: Any) -> None:
    """Twice the divisor, half the step; what is drawn does not matter."""
    steps = []
    for expected in (3.0, 6.0):
        model = made(copy.deepcopy(base), "lora")
        before = values(model)
        fit(model, mechanism(expected=expected, steps=1))
        steps.append({n: values(model)[n] - before[n] for n in before})
    assert furthest(steps[0], {n: 2 * t for n, t in steps[1].items()}) < 1e-6
    assert furthest(steps[0], {n: torch.zeros_like(t) for n, t in steps[0].items()}) > 1e-3


def test_bits_follow_from_the_generators_alone(base: Any) -> None:
    ends = []
    for change in ({}, {}, {"draws": np.random.default_rng(6)}, {"noise": normal(8)}):
        model = made(copy.deepcopy(base), "lora")
        state = torch.get_rng_state()
        fit(model, mechanism(), **change)
        assert torch.equal(state, torch.get_rng_state())
        torch.rand(3)
        ends.append(values(model))
    assert furthest(ends[0], ends[1]) == 0.0
    assert furthest(ends[0], ends[2]) > 1e-3 < furthest(ends[0], ends[3])


def test_passes_of_any_size_train_alike(base: Any) -> None:
    ends = []
    for tokens in (10_000, 40, 1):
        model = made(copy.deepcopy(base), "lora")
        fit(model, mechanism(micro_tokens=tokens))
        ends.append(values(model))
    assert furthest(ends[0], ends[1]) < 1e-5 > furthest(ends[0], ends[2])


@pytest.mark.parametrize("name", ["classify", "label-words", "reward", "dpo", "orpo"])
def test_other_objectives_train(name: str, base: Any) -> None:
    """Without noise the loss falls, and the objective packs again afterwards."""
    model = made(base, "lora", {"classify": 3, "reward": 1}.get(name, 0))
    objective, examples = task(name, model, spec())
    m = mechanism(noise=0.0, clip=5.0, rate=1.0, expected=len(examples), steps=6)
    result = fit(model, m, spec(lr=0.05), objective=objective, data=TokenSet.of(examples))
    assert result.losses[-1] < result.losses[0] and objective.tools.spec.packing


def test_the_optimisers_moments_go_on(base: Any) -> None:
    """Two rounds with the moments kept are one of twice the steps."""
    whole, parts = made(copy.deepcopy(base), "lora"), made(base, "lora")
    s = spec(optimizer="adamw", lr=1e-2, keep_optimizer=True)
    draws, noise = np.random.default_rng(5), normal()
    fit(whole, mechanism(steps=6), s)
    first = fit(parts, mechanism(), s, draws=draws, noise=noise)
    fit(parts, mechanism(), s, draws=draws, noise=noise, optimizer_state=first.optimizer_state)
    assert furthest(values(whole), values(parts)) < 1e-6


def cycled(steps: int, first: int = 0, bands: int | None = None) -> Any:
    cycle = plan("example", 8, 2, steps, 2.0, 1e-3, bands)
    rows = CorrelatedNoise(cycle, bytes(32), ("run",), first)
    return lambda name, shape, std: std * torch.from_numpy(rows(name, shape.numel())).float().view(shape)


def test_a_cycle_goes_on_from_round_to_round(base: Any) -> None:
    """Two rounds of three steps are one of six, to the bit: the same batches, and noise that goes on."""
    whole, parts = made(copy.deepcopy(base), "lora"), made(base, "lora")
    once = fit(whole, mechanism(cycle=4, steps=6, expected=2.0), noise=cycled(6))
    took = [fit(parts, mechanism(cycle=4, expected=2.0), noise=cycled(6, 3 * r), window=Window(r, 2)) for r in (0, 1)]
    assert furthest(values(whole), values(parts)) == 0.0
    assert once.losses == took[0].losses + took[1].losses and once.examples == 12


def test_correlated_noise_takes_itself_back(base: Any) -> None:
    """Where clipping leaves only noise, 16 steps of SGD move a number by the sum of theirs: its deviation is that of
    the last row of the summing matrix times C^-1 (to 1 %), two thirds of what independent noise gives."""
    moved = []
    for bands in (4, 1):
        model = made(copy.deepcopy(base), "full")
        before = values(model)
        m = mechanism(cycle=4, steps=16, clip=1e-6, noise=1e5, expected=2.0)
        fit(model, m, noise=cycled(16, bands=bands))
        total = torch.cat([(before[n] - v).flatten() for n, v in values(model).items()])
        moved.append(float(total.std()) / (0.1 * 1e5 * 1e-6 / 2.0))
        true = np.linalg.norm(np.ones(16) @ np.linalg.inv(banded_square_root(16, bands)))
        assert moved[-1] == pytest.approx(true, rel=0.01)
    assert moved[0] < 0.7 * moved[1]


def test_fedprox_pulls_after_the_noise_and_scaffold_is_refused(base: Any) -> None:
    model = made(base, "lora")
    start = values(model)
    away = {n: v + 1.0 for n, v in start.items()}

    class Far(Proximal):
        def start(self) -> Any:
            return start

    m = mechanism(rate=1e-9, noise=0.0, steps=1)
    fit(model, m, rule=Far(away, {}, Place(), 0.5))
    pulled = {n: v + 0.1 * 0.5 for n, v in start.items()}
    assert furthest(values(model), pulled) < 1e-6
    variates = {VARIATE + n: torch.zeros_like(v) for n, v in start.items()}
    with pytest.raises(TrainingError, match="ControlVariates changes weights or gradients between steps"):
        fit(model, m, rule=ControlVariates(start | variates, {}, Place()))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"clip_norm": 1.0}, "clip_norm`: it clips a step's mean gradient"),
        ({"spike_guard": 6.0}, "spike_guard`"),
        ({"compile": True}, "compile`"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing`"),
    ],
)
def test_settings_without_a_place_are_refused(changes: dict[str, Any], reason: str, base: Any) -> None:
    with pytest.raises(TrainingError, match=reason):
        fit(made(base, "lora"), mechanism(), spec(**changes))


@pytest.mark.parametrize("changes", [{"clip": 0.0}, {"noise": -1.0}, {"expected": 0.0}, {"clip": float("inf")}])
def test_mechanisms_that_are_none_are_refused(changes: dict[str, Any], base: Any) -> None:
    with pytest.raises(TrainingError):
        fit(made(base, "lora"), mechanism(**changes))


def test_kto_is_refused_before_anything_is_trained(base: Any) -> None:
    model = made(base, "lora")
    before = values(model)
    objective = PreferenceObjective(Tools(model, spec()), PreferenceSpec(loss="kto"))
    with pytest.raises(TrainingError, match="KTO"):
        fit(model, mechanism(), objective=objective, data=TokenSet.of(pairs()))
    assert furthest(before, values(model)) == 0.0


def test_a_training_that_runs_away_is_stopped_by_its_parameters(base: Any) -> None:
    with pytest.raises(TrainingError, match="not finite after private step"):
        fit(made(base, "lora"), mechanism(noise=1e4), spec(lr=1e38))


def test_what_tells_of_rows_is_marked_and_not_observed(base: Any) -> None:
    events: list[dict[str, Any]] = []
    result = fit(made(base, "lora"), mechanism(), observe=events.append)
    public = {"steps", "skipped", "optimizer_state"}
    assert PrivateResult.WITHHELD | public == set(vars(result)) and isinstance(result, TrainResult)
    assert [set(e) for e in events] == [{"kind", "round", "silo", "step", "steps"}] * 3
    assert len(result.losses) == 3 and result.loss > 0
