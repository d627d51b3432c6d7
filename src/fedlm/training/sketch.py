"""Sketches of the full gradient dL/dW of frozen weights, taken while it flows by: the gradient itself is never held.

For a layer y = W x with gradient G = dL/dW = sum over tokens of (dL/dy) x' [d_out, d_in], Gaussian matrices
Omega [d_in, k] and Psi [k, d_out] give the two-sided sketch of Halko, Martinsson and Tropp (SIAM Review 2011, section
5.5), which needs only one pass over the tokens:

    Y = G Omega [d_out, k]        Z = Psi G [k, d_in]

Both are linear in G. With matrices that all silos share, the mean of the silos' sketches is therefore the sketch
of the mean gradient, exactly, and its main directions follow (`factors`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from fedlm.messages import Observe, Tensors
from fedlm.models.adapters import lora_layers
from fedlm.randomness import torch_generator
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.batches import batches, steps_per_round
from fedlm.training.encode import TokenSet
from fedlm.training.forward import model_device
from fedlm.training.loop import TrainResult, check_length, micro_batches, seeded, training_mode
from fedlm.training.objective import Likelihood, Objective, Tools

LEFT, RIGHT = "sketch_Y", "sketch_Z"
"""Last parts of a sketch's names: `<layer>.sketch_Y` [d_out, k], `<layer>.sketch_Z` [k, d_in]."""


def width(rank: int, size: int) -> int:
    """k for a side of this size: twice the rank that is wanted (on spectra that fall like 1/i this finds 95 % of the
    energy of the best factors), and never more than there is."""
    return min(2 * rank, size)


def sketch_gradient(
    model: Module,
    data: TokenSet,
    spec: TrainingSpec,
    rank: int,
    *,
    seed: int,
    generator_key: tuple[str | int, ...],
    objective: Objective | None = None,
    observe: Observe | None = None,
    silo: str = "",
    should_stop: Callable[[], bool] | None = None,
) -> tuple[TrainResult, Tensors]:
    """Sketch the gradient of the mean loss over what the loss is a mean of (target tokens, pairs ...) in a round's
    batches, at fixed weights.

    Args:
        model: its LoRA layers' base weights are meant; some adapter parameter must require a gradient.
        spec: says which examples a round goes through, as for training.
        rank: what the factors will have.
        seed: keys the random matrices, with the layer's name.
        generator_key: (seed, silo, ...) of the batch order, as for training.
        should_stop: asked before every batch; True ends early.

    Returns:
        What was seen (no optimiser step), and Y and Z of every LoRA layer, fp32 on the CPU.
    """
    check_length(model, spec.max_length)
    began, device = time.perf_counter(), model_device(model)
    objective = objective or Likelihood(Tools(model, spec))
    result, loss_total = TrainResult(0, 0, 0, 0, 0.0, [], 0.0, {}), 0.0
    steps = steps_per_round(spec, len(data))
    with ExitStack() as stack:
        stack.enter_context(training_mode(model, spec.model_copy(update={"compile": False})))
        stack.enter_context(seeded(generator_key, 0, device))
        sketches = {name: _Sketch(name, layer, rank, seed) for name, layer in lora_layers(model).items()}
        for name, layer in lora_layers(model).items():
            stack.callback(layer.register_forward_hook(sketches[name]).remove)
        for step, chosen in enumerate(batches(spec, data.lengths, generator_key, 0)):
            if should_stop is not None and should_stop():
                break
            examples, total, divisor = objective.begin([data[i] for i in chosen]), 0.0, 0.0
            for part in micro_batches(examples, spec):
                terms, divisor = objective.terms(part)
                loss = terms.sum()
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            model.zero_grad(set_to_none=True)
            result.examples += len(examples)
            result.tokens += sum(len(e) for e in examples)
            result.target_tokens += sum(e.targets for e in examples)
            result.losses.append(total / divisor)
            result.loss_count += divisor
            loss_total += total
            result.seconds = time.perf_counter() - began
            if observe is not None:
                told = {"kind": "step", "round": 0, "silo": silo, "step": step, "steps": steps}
                observe({**told, "loss": result.losses[-1], "tokens_per_second": result.tokens / result.seconds})
    count = max(result.loss_count, 1)
    result.loss, result.figures = loss_total / count, objective.figures
    out: Tensors = {}
    for name, sketch in sketches.items():
        out[f"{name}.{LEFT}"] = (sketch.y / count).cpu()
        out[f"{name}.{RIGHT}"] = (sketch.z / count).cpu()
    return result, out


class _Sketch:
    """One layer's sketch; a forward hook that waits for the gradient of the layer's output."""

    def __init__(self, name: str, layer: Any, rank: int, seed: int) -> None:
        d_in, d_out, device = layer.in_features, layer.out_features, layer.get_base_layer().weight.device
        self.omega, self.psi = (matrix.to(device) for matrix in random_matrices(name, d_out, d_in, rank, seed))
        self.y = torch.zeros(d_out, self.omega.shape[1], device=device)
        self.z = torch.zeros(len(self.psi), d_in, device=device)

    def __call__(self, module: Module, args: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG002
        if output.requires_grad:  # an objective may look at the model besides
            output.register_hook(partial(self.add, args[0].detach()))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Y += dy' (x Omega), Z += (Psi dy') x over the tokens of x [..., d_in] and dy [..., d_out]."""
        x, dy = x.reshape(-1, x.shape[-1]).float(), dy.reshape(-1, dy.shape[-1]).float()
        self.y.addmm_(dy.t(), x @ self.omega)
        self.z.addmm_(self.psi @ dy.t(), x)


def random_matrices(name: str, d_out: int, d_in: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Omega [d_in, k] and Psi [k, d_out] of a layer: standard normal, the same in every silo."""
    omega = torch.randn(d_in, width(rank, d_in), generator=torch_generator(seed, "sketch", name, RIGHT))
    psi = torch.randn(width(rank, d_out), d_out, generator=torch_generator(seed, "sketch", name, LEFT))
    return omega, psi


def factors(y: Tensor, z: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [d_out, r] and A [r, d_in], orthonormal: nearly the first r left and right singular vectors of a sketched G.

    Y's main directions are nearly those of G's columns, Z's those of its rows. In fp64.
    """
    b = torch.linalg.svd(y.double(), full_matrices=False)[0][:, :rank]
    a = torch.linalg.svd(z.double(), full_matrices=False)[2][:rank]
    return b.float().contiguous(), a.float().contiguous()
