"""The local loop: one silo, one round, read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlm.errors import TrainingError
from fedlm.messages import Observe, Tensors
from fedlm.models.soft_prompts import virtual_tokens
from fedlm.randomness import key
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import causal_model, packed
from fedlm.training.batches import batches, steps_per_round
from fedlm.training.encode import TokenSet
from fedlm.training.forward import by_tokens, model_device
from fedlm.training.fused_lora import fused_lora
from fedlm.training.fused_norm import fused_norms
from fedlm.training.objective import Figures, Likelihood, Objective, Tools
from fedlm.training.schedule import learning_rate
from fedlm.training.spikes import SpikeGuard

if TYPE_CHECKING:
    from fedlm.training.parallel import Team

MICRO_TOKENS = 2048
"""Tokens per forward pass where the recipe leaves `micro_batch_size` open; accumulation is exact, so only speed and
memory depend on it."""

SPIKES = "spike_guard"
"""Name of what the guard remembers, beside the optimiser's moments, which all have a '/' in theirs."""


class LocalRule(Protocol):
    """What the loop needs of an algorithm: see `fedlm.algorithms.base.LocalRule`."""

    def start(self) -> Tensors: ...

    def before(self, step: int, parameters: dict[str, Parameter]) -> None: ...

    def correct(self, parameters: dict[str, Parameter]) -> None: ...


@dataclass(frozen=True)
class Window:
    """Where this round lies in the run; the schedule is over the whole run's progress."""

    round: int
    rounds: int


@dataclass
class TrainResult:
    """What a round of local training did."""

    steps: int
    examples: int
    tokens: int
    """Real tokens of all examples used; a shared beginning counts for each."""
    target_tokens: int
    loss: float
    """Mean loss over all steps, each at the parameters it was computed with; a step counts for what its loss is a mean
    of (target tokens, pairs ...)."""
    losses: list[float]
    """Loss of each optimiser step."""
    seconds: float
    optimizer_state: Tensors
    """What the silo keeps for its next round, on the CPU: with `keep_optimizer` moments by '<parameter>/<field>'
    (fp32), with `spike_guard` what that remembers. Both go into the next round as they are."""
    loss_count: float = 0.0
    """What `loss` is a mean of: target tokens, pairs ..."""
    figures: Figures = field(default_factory=dict)
    """The objective's own and the loop's, over all steps."""
    skipped: list[int] = field(default_factory=list)
    """Of all steps, those that the spike guard left out."""


def train(
    model: Module,
    parameters: dict[str, Parameter],
    data: TokenSet,
    spec: TrainingSpec,
    window: Window,
    *,
    generator_key: tuple[str | int, ...],
    rule: LocalRule | None,
    objective: Objective | None = None,
    optimizer_state: Tensors | None = None,
    observe: Observe | None = None,
    silo: str = "",
    should_stop: Callable[[], bool] | None = None,
    team: Team | None = None,
) -> TrainResult:
    """Train `parameters` in place for one round.

    The loss of an optimiser step is the objective's over the whole batch, however it is cut into forward passes;
    without an objective the mean negative log-likelihood of the targets. A bf16 model runs under autocast: matrix
    products in bf16, trainable parameters, gradients and optimiser in their own dtype (fp32).

    Args:
        generator_key: (seed, silo, ...) of the batch order; the round is added here.
        rule: gives the parameters to start from, may change them before a step, and corrects gradients after clipping;
            None changes nothing.
        optimizer_state: what this silo's last round left, empty or None at the beginning.
        should_stop: asked before every step; True ends the round early.
        team: processes that share the steps of a `Likelihood`, their models loaded (see `fedlm.training.parallel`).

    Raises:
        TrainingError: the loss or a gradient is not finite, the rule's parameters do not fit, examples are longer
            than the model, or a process of the team ended.
    """
    check_length(model, spec.max_length)
    if len(data) == 0:
        raise TrainingError("there is nothing to train on", where=silo or None)
    began = time.perf_counter()
    if rule is not None:
        _load(parameters, rule.start(), silo)
    optimizer = make_optimizer(spec, parameters)
    optimizer.zero_grad(set_to_none=True)  # a training that failed here before may have left gradients behind
    kept = dict(optimizer_state or {})
    guard = SpikeGuard(spec.spike_guard, kept.pop(SPIKES, None)) if spec.spike_guard is not None else None
    load_optimizer_state(optimizer, parameters, kept)
    kept.clear()  # the optimiser has copies
    device = model_device(model)
    steps = steps_per_round(spec, len(data))
    result = TrainResult(0, 0, 0, 0, 0.0, [], 0.0, {})
    objective = objective or Likelihood(Tools(model, spec))
    loss_total = 0.0
    shared = team.round(parameters, spec, generator_key, window.round) if team is not None else nullcontext()
    with training_mode(model, spec), seeded(generator_key, window.round, device), shared:
        for step, chosen in enumerate(batches(spec, data.lengths, generator_key, window.round)):
            if should_stop is not None and should_stop():
                break
            rate = learning_rate(spec, (window.round * steps + step) / (window.rounds * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate
            if rule is not None:
                rule.before(step, parameters)
            examples = objective.begin([data[i] for i in chosen])
            total = divisor = 0.0
            for part in micro_batches(examples, spec) if team is None else team.passes(examples, spec):
                terms, divisor = objective.terms(part)
                loss = terms.sum() / divisor
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach()) * divisor
            if team is not None:
                total = team.add(total)
            _require_finite(total, silo, step, "loss")
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
            if team is not None:
                norm = team.norm(norm)
            _require_finite(float(norm), silo, step, "gradient")
            taken = guard is None or not guard.leaps(total / divisor, float(norm))
            if team is not None:
                team.decide(rate, taken)
            if not taken:
                result.skipped.append(step)
            else:
                if spec.clip_norm is not None:
                    torch.nn.utils.clip_grads_with_norm_(parameters.values(), spec.clip_norm, norm)
                if rule is not None:
                    rule.correct(parameters)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            result.steps += 1
            result.examples += len(examples)
            result.tokens += sum(len(e) for e in examples)
            result.target_tokens += sum(e.targets for e in examples)
            result.losses.append(total / divisor)
            result.loss_count += divisor
            loss_total += total
            result.seconds = time.perf_counter() - began
            if observe is not None:
                observe(
                    {
                        "kind": "step",
                        "round": window.round,
                        "silo": silo,
                        "step": step,
                        "steps": steps,
                        "loss": result.losses[-1],
                        "tokens_per_second": result.tokens / result.seconds,
                    }
                )
    result.loss = loss_total / max(result.loss_count, 1)
    if spec.keep_optimizer:
        result.optimizer_state = save_optimizer_state(optimizer, parameters)
    if guard is not None:
        result.optimizer_state[SPIKES] = guard.state
        objective.count("skipped_steps", len(result.skipped), result.steps)
    result.figures = objective.figures
    result.seconds = time.perf_counter() - began
    return result


T = TypeVar("T", bound=Sized)


def micro_batches(examples: list[T], spec: TrainingSpec) -> Iterator[list[T]]:
    """The forward passes of one optimiser step."""
    if spec.micro_batch_size is not None:
        size = spec.micro_batch_size
        yield from (examples[i : i + size] for i in range(0, len(examples), size))
        return
    for run in by_tokens([len(e) for e in examples], MICRO_TOKENS):
        yield [examples[i] for i in run]


def check_length(model: Module, max_length: int) -> None:
    """Refuse a `max_length` beyond the model's positions.

    Raises:
        TrainingError: naming both numbers.
    """
    limit = getattr(causal_model(model).config, "max_position_embeddings", None)
    virtual = virtual_tokens(model)
    if limit is not None and max_length + virtual > limit:
        taken = f", of which the prompt takes {virtual}" if virtual else ""
        raise TrainingError(
            f"`training.max_length` is {max_length} but the model has {limit} positions{taken}",
            fix=f"set `training.max_length` to {limit - virtual} or less",
        )


@contextmanager
def training_mode(model: Module, spec: TrainingSpec) -> Iterator[None]:
    """Everything that is switched on for training and off again afterwards."""
    was_training, inner = model.training, causal_model(model)
    with ExitStack() as stack:
        stack.enter_context(packed(model) if spec.packing else nullcontext())
        model.train()
        if spec.compile:
            stack.enter_context(compiled(inner))
        else:
            stack.enter_context(fused_lora(model))
            if model_device(model).type == "cpu":
                stack.enter_context(fused_norms(model))
        stack.callback(model.train, was_training)
        if spec.gradient_checkpointing:
            inner.activation_checkpointing_enable({"use_reentrant": False})
            stack.callback(inner.activation_checkpointing_disable)
        yield


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Decoder layers through torch.compile, which then fuses in place of fedlm's own fused layers."""
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(f"{type(model).__name__} has no layers to compile", fix="set `training.compile: false`")
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


@contextmanager
def seeded(generator_key: tuple[str | int, ...], round_: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from a generator of this silo and round; the process's own generators are left untouched."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(key(int(generator_key[0]), "dropout", *generator_key[1:], round_))
        yield


def make_optimizer(spec: TrainingSpec, parameters: dict[str, Parameter]) -> torch.optim.Optimizer:
    """AdamW or SGD from torch over the parameters in their given order."""
    values = list(parameters.values())
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(values, lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay)
    return torch.optim.SGD(values, lr=spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def save_optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, Parameter]) -> Tensors:
    """Moments and step counts by '<parameter>/<field>'."""
    found: Tensors = {}
    for name, parameter in parameters.items():
        for slot, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                found[f"{name}/{slot}"] = value.detach().to("cpu", torch.float32)
    return found


def load_optimizer_state(optimizer: torch.optim.Optimizer, parameters: dict[str, Parameter], state: Tensors) -> None:
    """Put back what `save_optimizer_state` gave.

    Raises:
        TrainingError: a name or shape does not fit the parameters.
    """
    for slot, value in state.items():
        name, _, field = slot.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or value.shape not in (parameter.shape, torch.Size([])):
            raise TrainingError(f"the kept optimiser state does not fit parameter '{name or slot}'")
        device = "cpu" if field == "step" else parameter.device
        optimizer.state[parameter][field] = value.to(device, copy=True)


@torch.no_grad()
def _load(parameters: dict[str, Parameter], start: Tensors, silo: str) -> None:
    missing = parameters.keys() - start.keys()
    if missing:
        raise TrainingError(f"no starting value for parameter '{min(missing)}'", where=silo or None)
    for name, parameter in parameters.items():
        parameter.copy_(start[name])


def _require_finite(value: Any, silo: str, step: int, what: str) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"the {what} became {value} at step {step}",
            where=f"silo {silo}" if silo else None,
            fix="lower `training.lr`, set `training.clip_norm`, or use `model.dtype: float32`",
        )
