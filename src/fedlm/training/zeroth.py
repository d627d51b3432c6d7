"""Zeroth-order local training: the loop of `fedlm.training.loop` without gradients, in the memory of inference.

A step asks for the loss at two points on a random line through the weights (SPSA: Spall, 1992) and moves along it. The
weights are perturbed in place and the direction z is drawn anew each time it is needed (MeZO: Malladi et al., NeurIPS
2023, algorithm 1), so that neither gradients, activations of a backward pass, optimiser state nor z are held.

Perturbing in place rounds: after a step along which nothing moves, a weight differs from before by at most two units
in the last place of max(|w|, eps |z|).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Module

from fedlm.errors import TrainingError
from fedlm.messages import Observe
from fedlm.models.directions import move
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.batches import batches, steps_per_round
from fedlm.training.encode import TokenSet
from fedlm.training.loop import TrainResult, Window, check_length, micro_batches
from fedlm.training.objective import Likelihood, Objective, Tools
from fedlm.training.schedule import learning_rate
from fedlm.training.sequences import Example

Direction = Callable[[int], torch.Generator]
"""What draws the direction z of a step, at its start each time it is asked for."""

Stride = Callable[[int, float, float], float]
"""How far to go along z, given the step's number, the projected gradient and the learning rate."""


def projected_gradient(
    weights: Mapping[str, Tensor], z: Callable[[], torch.Generator], eps: float, loss: Callable[[], float]
) -> tuple[float, float]:
    """(L(w + eps z) - L(w - eps z)) / (2 eps), which is <gradient, z> up to O(eps^2), and the mean of both losses.

    Leaves the weights at w - eps z: whoever steps next adds eps to the step's length and saves a sweep.
    """
    move(weights, z(), eps)
    above = loss()
    move(weights, z(), -2 * eps)
    below = loss()
    return (above - below) / (2 * eps), (above + below) / 2


@torch.no_grad()
def train_zeroth(
    model: Module,
    weights: Mapping[str, Tensor],
    data: TokenSet,
    spec: TrainingSpec,
    window: Window,
    *,
    generator_key: tuple[str | int, ...],
    eps: float,
    direction: Direction,
    stride: Stride,
    objective: Objective | None = None,
    observe: Observe | None = None,
    silo: str = "",
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Step `weights` in place for one round, each step along a direction of its own.

    A step's loss is that of `fedlm.training.loop.train`, without dropout. Of the settings only batches, lengths,
    packing, learning rate and schedule are read.

    Args:
        weights: the parameters that move, in the order in which directions are laid out over them.
        generator_key: (seed, silo, ...) of the batch order; the round is added here.
        eps: half the distance between the two points, in lengths of z.
        stride: the signed distance that the step goes along z.
        should_stop: asked before every step; True ends the round early.

    Raises:
        TrainingError: the loss is not finite, there are no examples, or they are longer than the model.
    """
    check_length(model, spec.max_length)
    if len(data) == 0:
        raise TrainingError("there is nothing to train on", where=silo or None)
    began, steps = time.perf_counter(), steps_per_round(spec, len(data))
    objective = objective or Likelihood(Tools(model, spec))
    result = TrainResult(0, 0, 0, 0, 0.0, [], 0.0, {})
    with measuring(model, spec):
        for step, chosen in enumerate(batches(spec, data.lengths, generator_key, window.round)):
            if should_stop is not None and should_stop():
                break
            rate = learning_rate(spec, (window.round * steps + step) / (window.rounds * steps))
            examples = objective.begin([data[i] for i in chosen])
            divisor = 0.0

            def loss(examples: list[Example] = examples) -> float:
                nonlocal divisor
                mean, divisor = mean_loss(objective, examples, spec)
                return mean

            def z(step: int = step) -> torch.Generator:
                return direction(step)

            slope, mean = projected_gradient(weights, z, eps, loss)
            if not math.isfinite(slope):
                raise TrainingError(
                    f"the loss became {mean} at step {step}",
                    where=f"silo {silo}" if silo else None,
                    fix="lower the learning rate or `federation.algorithm.zo_eps`",
                )
            move(weights, z(), eps + stride(step, slope, rate))

            result.steps += 1
            result.examples += len(examples)
            result.tokens += sum(len(e) for e in examples)
            result.target_tokens += sum(e.targets for e in examples)
            result.losses.append(mean)
            result.loss += mean * divisor
            result.loss_count += divisor
            result.seconds = time.perf_counter() - began
            if observe is not None:
                event = {"kind": "step", "round": window.round, "silo": silo, "step": step, "steps": steps}
                observe({**event, "loss": mean, "tokens_per_second": result.tokens / result.seconds})
    result.loss /= max(result.loss_count, 1)
    result.figures = objective.figures
    result.seconds = time.perf_counter() - began
    return result


def mean_loss(objective: Objective, examples: list[Example], spec: TrainingSpec) -> tuple[float, float]:
    """A step's loss, summed in fp64 since the difference of two such losses is small, and what it is a mean of."""
    found = [objective.terms(part) for part in micro_batches(examples, spec)]
    divisor = found[0][1]
    return sum(float(terms.double().sum()) for terms, _ in found) / divisor, divisor


@contextmanager
def measuring(model: Module, spec: TrainingSpec) -> Iterator[None]:
    """Everything that is switched on for losses without gradients."""
    training = model.training
    model.eval()
    try:
        with packed(model) if spec.packing else nullcontext():
            yield
    finally:
        model.train(training)
