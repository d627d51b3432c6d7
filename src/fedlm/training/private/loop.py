"""The private local loop: DP-SGD, or DP-FTRL, beside `fedlm.training.loop.train`, step for step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module, Parameter

from fedlm.errors import TrainingError
from fedlm.messages import Observe, Tensors
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.forward import model_device
from fedlm.training.loop import (
    LocalRule,
    TrainResult,
    Window,
    _load,
    check_length,
    load_optimizer_state,
    make_optimizer,
    save_optimizer_state,
    seeded,
)
from fedlm.training.objective import Likelihood, Objective, Tools
from fedlm.training.private.check import check_gradients
from fedlm.training.private.gradients import MICRO_TOKENS, Way, clipped_sum
from fedlm.training.private.losses import require_separable
from fedlm.training.private.sampling import Indices, cyclic_batches, poisson_batches, rows_by_user, some_rows
from fedlm.training.schedule import learning_rate
from fedlm.training.sequences import Example

Noise = Callable[[str, torch.Size, float], Tensor]
"""A parameter's name, its shape and a deviation to draws from the normal distribution, on the CPU: independent, or
correlated from one step to the next as the mechanism says. They must be the silo's secret."""


PrivateTrainer = Callable[..., "PrivateResult"]
"""`train_private` with its mechanism, draws and noise."""


@dataclass(frozen=True)
class Mechanism:
    """What is done in the steps of one round. All of it is public, and none may be computed from rows.

    Without a cycle it is the subsampled Gaussian mechanism (DP-SGD); with one, units take part in a fixed order, and
    the noise is correlated across steps (DP-FTRL: Kairouz et al., ICML 2021).
    """

    clip: float
    """C: what a unit, an example or a user, adds to a step has at most this norm."""
    noise: float
    """sigma: the deviation of a coordinate's noise, of the fresh one where it is correlated, is sigma C."""
    rate: float
    """q: with which probability a unit takes part in a step; with a cycle not read."""
    expected: float
    """What the noised sum is divided by: the units expected in a step, q times a public number of them. It is the
    same whether or not one of them is there, and never the number drawn."""
    steps: int
    """Of the round, whatever is drawn."""
    way: Way | None = None
    """See `fedlm.training.private.gradients`."""
    micro_tokens: int = MICRO_TOKENS
    user_examples: int | None = None
    """Users are the units: of one that takes part in a step, at most so many examples, whose gradients' mean is
    clipped. None: examples are the units."""
    cycle: int | None = None
    """Batches of all units, one after the other over the steps of the whole run. None: units are drawn at random."""


@dataclass
class PrivateResult(TrainResult):
    """What a round of private training did. Beside the trained parameters, which are noised, almost nothing may leave
    the silo."""

    not_finite: int = 0
    """Times that a unit added nothing because its gradient was not finite."""

    WITHHELD: ClassVar[frozenset[str]] = frozenset(
        {
            "examples",
            "tokens",
            "target_tokens",
            "loss",
            "losses",
            "loss_count",
            "figures",
            "seconds",
            "not_finite",
        }
    )
    """Fields that tell of rows without noise: what is drawn is secret, and losses, figures and times follow from it.
    They are the silo's own to read. `optimizer_state` is made of noised gradients alone."""


def train_private(
    model: Module,
    parameters: dict[str, Parameter],
    data: TokenSet,
    spec: TrainingSpec,
    window: Window,
    mechanism: Mechanism,
    *,
    draws: np.random.Generator,
    noise: Noise,
    picks: np.random.Generator | None = None,
    generator_key: tuple[str | int, ...],
    rule: LocalRule | None = None,
    objective: Objective | None = None,
    optimizer_state: Tensors | None = None,
    observe: Observe | None = None,
    silo: str = "",
    should_stop: Callable[[], bool] | None = None,
) -> PrivateResult:
    """Train `parameters` in place for one round, each example of `data`, or user, protected by the mechanism.

    A step draws its units, sums their clipped gradients, adds noise, divides by what is expected, and lets the
    optimiser take the result as a gradient. Everything after the noise is a function of it and of public values.

    Of `spec` the optimiser, its rates and schedule count; `steps`, `epochs`, `batch_size`, `micro_batch_size`, `order`
    and `packing` do not, in whose place the mechanism says what is done.

    Args:
        draws: of the units; the silo's secret.
        picks: of a user's examples, where users are the units; the silo's secret.
        noise: its values are drawn by parameter, in their order, once a step; not called where sigma is 0. With a cycle
            those of step t of the run, the round's first being window.round * steps.
        generator_key: (seed, silo, ...) of dropout; the round is added here.
        rule: as in `train`; one that works between steps must say that it does so on noised gradients (`after_noise`).
        should_stop: asked before every step. It may look at the clock and not at the rows.

    Raises:
        TrainingError: something of the recipe is not private, examples do not say whose they are and should, the check
            of `fedlm.training.private.check` fails, or the parameters are no longer finite.
        MissingExtra: Opacus is not installed.
    """
    check_length(model, spec.max_length)
    _require_private(spec, mechanism, rule)
    if len(data) == 0:
        raise TrainingError("there is nothing to train on", where=silo or None)
    began = time.perf_counter()
    if rule is not None:
        _load(parameters, rule.start(), silo)
    optimizer = make_optimizer(spec, parameters)
    load_optimizer_state(optimizer, parameters, dict(optimizer_state or {}))
    units = _units(data, mechanism, picks)
    device, steps = model_device(model), mechanism.steps
    objective = objective or Likelihood(Tools(model, spec))
    result = PrivateResult(0, 0, 0, 0, 0.0, [], 0.0, {})
    total_loss = 0.0
    with private_mode(model, objective), seeded(generator_key, window.round, device):
        require_separable(objective, [data[0]])
        check_gradients(objective, parameters, data[0], way=mechanism.way)
        for step, chosen in enumerate(_batches(len(units), mechanism, window, draws)):
            if should_stop is not None and should_stop():
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, (window.round * steps + step) / (window.rounds * steps))
            if rule is not None:
                rule.before(step, parameters)
            taken = [units.examples(int(i)) for i in chosen]
            examples = [example for unit in taken for example in unit]
            found = clipped_sum(
                objective,
                parameters,
                taken,
                mechanism.clip,
                way=mechanism.way,
                micro_tokens=mechanism.micro_tokens,
            )
            for name, parameter in parameters.items():
                parameter.grad = noised(name, found.total[name], mechanism, noise).to(parameter.dtype)
            if rule is not None:
                rule.correct(parameters)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            _require_finite(parameters, silo, step)

            result.steps += 1
            result.examples += len(examples)
            result.tokens += sum(len(e) for e in examples)
            result.target_tokens += sum(e.targets for e in examples)
            result.losses.append(float(found.losses.mean()) if examples else 0.0)
            result.loss_count += len(taken)
            result.not_finite += found.not_finite
            total_loss += float(found.losses.sum())
            if observe is not None:
                observe({"kind": "step", "round": window.round, "silo": silo, "step": step, "steps": steps})
    result.loss = total_loss / max(result.loss_count, 1)
    if spec.keep_optimizer:
        result.optimizer_state = save_optimizer_state(optimizer, parameters)
    result.figures = objective.figures
    result.seconds = time.perf_counter() - began
    return result


@dataclass(frozen=True)
class _Units:
    """What is protected as a whole, and the examples with which each takes part in a step."""

    data: TokenSet
    rows: list[Indices] | None
    """By user the numbers of its examples; None where each example is a unit."""
    most: int
    picks: np.random.Generator | None

    def __len__(self) -> int:
        return len(self.data) if self.rows is None else len(self.rows)

    def examples(self, unit: int) -> list[Example]:
        if self.rows is None:
            return [self.data[unit]]
        assert self.picks is not None
        return [self.data[int(i)] for i in some_rows(self.rows[unit], self.most, self.picks)]


def _units(data: TokenSet, mechanism: Mechanism, picks: np.random.Generator | None) -> _Units:
    if mechanism.user_examples is None:
        return _Units(data, None, 1, None)
    if data.users is None or picks is None or mechanism.user_examples < 1:
        raise TrainingError(
            "users are to be protected, and the examples do not say whose they are",
            where="privacy.user",
            fix="name the column that says it",
        )
    return _Units(data, rows_by_user(data.users), mechanism.user_examples, picks)


def _batches(units: int, mechanism: Mechanism, window: Window, draws: np.random.Generator) -> Iterator[Indices]:
    if mechanism.cycle is None:
        return poisson_batches(units, mechanism.rate, mechanism.steps, draws)
    return cyclic_batches(units, mechanism.cycle, window.round * mechanism.steps, mechanism.steps, draws)


def noised(name: str, total: Tensor, mechanism: Mechanism, noise: Noise) -> Tensor:
    """(sum + N(0, sigma^2 C^2)) / expected for a parameter; the sum is changed in place."""
    if mechanism.noise > 0:
        total += noise(name, total.shape, mechanism.noise * mechanism.clip).to(total)
    return total.div_(mechanism.expected)


@contextmanager
def private_mode(model: Module, objective: Objective) -> Iterator[None]:
    """Training mode on padded batches: no row of a pass holds tokens of two examples."""
    tools, was_training = objective.tools, model.training
    objective.tools = replace(tools, spec=tools.spec.model_copy(update={"packing": False}))
    with ExitStack() as stack:
        stack.callback(setattr, objective, "tools", tools)
        stack.callback(model.train, was_training)
        model.train()
        yield


def _require_private(spec: TrainingSpec, mechanism: Mechanism, rule: LocalRule | None) -> None:
    """Refuse settings that private training has no place for."""
    refused = {
        "clip_norm": "it clips a step's mean gradient, and privacy clips each example's: set it to null",
        "spike_guard": "it skips steps by their losses before noise",
        "compile": "compiled layers do not show what they read",
        "gradient_checkpointing": "layers would be read twice; memory is bounded by the tokens of a pass instead",
    }
    for name, reason in refused.items():
        if getattr(spec, name) not in (None, False):
            raise TrainingError(f"private training refuses `training.{name}`: {reason}", where=f"training.{name}")
    if not (mechanism.clip > 0 and mechanism.noise >= 0 and mechanism.expected > 0):
        raise TrainingError(
            f"the clip ({mechanism.clip}) and the expected batch ({mechanism.expected}) must be above 0, and the noise "
            f"({mechanism.noise}) not below"
        )
    if mechanism.noise > 0 and mechanism.clip == float("inf"):
        raise TrainingError("without a clip no noise hides an example", fix="set a clip, or no noise")
    if rule is None or getattr(rule, "after_noise", False):
        return
    if getattr(rule, "between_steps", True):
        raise TrainingError(
            f"{type(rule).__name__} changes weights or gradients between steps, and is not known to do so from noised "
            "and public values alone",
            where="federation.algorithm",
            fix="use fedavg or fedprox",
        )


def _require_finite(parameters: dict[str, Parameter], silo: str, step: int) -> None:
    """The parameters follow from noised gradients, so that to stop here tells nothing else."""
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            raise TrainingError(
                f"parameter '{name}' is not finite after private step {step}",
                where=f"silo {silo}" if silo else None,
                fix="lower `training.lr` or the noise",
            )
