"""Bench: what a private optimiser step costs beside a plain one, in processor time and in memory.

    python benchmarks/private_step.py [--repeats 2] [--dtype float32] [--layers 30] [--adapters lora full] [--sides ...]

SmolLM2-135M, 16 examples of 48 to 64 tokens with short answers (as long as ARC's questions), AdamW, one thread. The
sides take one step after another, round robin over the repeats after one that is not counted, in one process for each
adapter. The time is a step's processor time, so that a busy machine counts little; the memory is the process's peak
during the step. What a round does once (loading, the check before private training) is left out.

`fused` is fedlm's own loop, packed and fused. `plain` is the step one would write: padded, PEFT's layers, autograd.
`auto`, `hooks`, `fast` and `ghost` are `train_private` in that way. `opacus` is Opacus' GradSampleModule on the same
padded batch, for LoRA: of full weights its ghost clipping refuses tied embeddings, and its other ways take the rows of
the output layer, which are those of targets alone, for examples. Goals: LoRA at most 1.4 x the time and 1.3 x the
memory of `fused`, full weights at most 2.2 x the time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training_speed import MODEL, MODEL_SHA256

BATCH, SHORTEST, LONGEST, LR, CLIP = 16, 48, 64, 1e-4, 1.0
PRIVATE = ("auto", "hooks", "fast", "ghost")
SIDES = {
    "lora": ("fused", "plain", *PRIVATE, "opacus"),
    "full": ("fused", "plain", "auto", "fast", "ghost"),
}
ADAPTERS = {"lora": {"rank": 8, "alpha": 16.0}, "full": {"kind": "full"}}


def examples() -> list[Any]:
    import numpy as np

    from fedlm.training.sequences import Encoded, Example

    draw, found = np.random.default_rng(0), []
    for _ in range(BATCH):
        length, answer = int(draw.integers(SHORTEST, LONGEST + 1)), int(draw.integers(3, 13))
        ids = draw.integers(100, 40_000, length).astype(np.int32)
        found.append(Example((Encoded(ids, np.arange(length) >= length - answer),)))
    return found


def step_of(side: str, model: Any) -> Callable[[], None]:
    """One optimiser step of this side, whenever it is called."""
    import numpy as np
    import torch

    from fedlm.models.adapters import trainable
    from fedlm.recipe.schema import TrainingSpec
    from fedlm.training.encode import TokenSet
    from fedlm.training.loop import Window, train

    spec = TrainingSpec(
        steps=1, batch_size=BATCH, max_length=LONGEST, lr=LR, clip_norm=CLIP if side == "fused" else None
    )
    parameters, data = trainable(model), TokenSet.of(examples())
    if side == "fused":
        return lambda: train(model, parameters, data, spec, Window(0, 1), generator_key=(0, "a"), rule=None) and None
    if side == "plain":
        return lambda: plain(model, parameters)
    if side == "opacus":
        return lambda: opacus(model, parameters, spec)
    from fedlm.training.private import loop

    loop.check_gradients = lambda *_, **__: None  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    mechanism = loop.Mechanism(CLIP, 1.0, 1.0, BATCH, 1, None if side == "auto" else side)  # type: ignore[arg-type]

    def private() -> None:
        loop.train_private(
            model,
            parameters,
            data,
            spec,
            Window(0, 1),
            mechanism,
            draws=np.random.default_rng(0),
            noise=lambda _, shape, std: torch.normal(0.0, std, shape, generator=generator),
            generator_key=(0, "a"),
        )

    return private


def plain(model: Any, parameters: dict[str, Any]) -> None:
    import torch

    from fedlm.training.forward import padded_nll, precision
    from fedlm.training.objective import sequences_of

    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    model.train()
    with precision(model):
        loss = padded_nll(model, sequences_of(examples())).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
    optimizer.step()
    optimizer.zero_grad()


def opacus(model: Any, parameters: dict[str, Any], spec: Any) -> None:
    import torch
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    from fedlm.training.objective import Likelihood, Tools
    from fedlm.training.private.losses import example_losses

    inner = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    objective = Likelihood(Tools(model.train(), spec.model_copy(update={"packing": False})))
    watched = GradSampleModule(model)
    private = DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=CLIP, expected_batch_size=BATCH)
    example_losses(objective, examples()).mean().backward()  # type: ignore[no-untyped-call]
    private.step()
    private.zero_grad()
    watched.cleanup()


def peak_mb() -> int:
    """The process's peak since `fresh_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def fresh_peak() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def run(adapter: str, sides: list[str], repeats: int, layers: int, dtype: str) -> None:
    """Prints a measurement as JSON after each step."""
    import torch

    from fedlm.models.adapters import attach
    from fedlm.models.load import load_base
    from fedlm.recipe.schema import AdapterSpec, ModelSpec

    torch.set_num_threads(1)
    base = load_base(ModelSpec(source=MODEL, sha256=MODEL_SHA256, dtype=dtype), device="cpu")  # type: ignore[arg-type]
    base.model.layers = base.model.layers[:layers]
    base.config.num_hidden_layers = len(base.model.layers)
    model = attach(base, AdapterSpec.model_validate(ADAPTERS[adapter]), 0)
    steps = {side: step_of(side, model) for side in sides}
    for repeat in range(repeats + 1):
        for side, step in steps.items():
            fresh_peak()
            began = time.process_time()
            step()
            seconds = time.process_time() - began
            one = {"adapter": adapter, "side": side, "seconds": seconds, "peak_mb": peak_mb(), "counted": repeat > 0}
            print(json.dumps(one), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", help="default: float32 where the processor has no bf16")
    parser.add_argument("--layers", type=int, default=30, help="the model's first so many")
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--sides", nargs="+", help="default: all")
    parser.add_argument("--json", type=Path, help="write every measurement here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from fedlm.models.processor import without_bf16

    dtype = arguments.dtype or ("float32" if without_bf16() else "bfloat16")
    if arguments.child:
        run(arguments.child, arguments.sides, arguments.repeats, arguments.layers, dtype)
        return
    found: list[dict[str, Any]] = []
    for adapter in arguments.adapters:
        sides = [s for s in SIDES[adapter] if not arguments.sides or s in arguments.sides]
        command = [sys.executable, __file__, "--child", adapter, "--sides", *sides, "--dtype", dtype]
        command += ["--repeats", str(arguments.repeats), "--layers", str(arguments.layers)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                found.append(json.loads(line))
                print(line, end="", flush=True)
        if child.returncode:
            raise SystemExit(f"{adapter} failed")
        measured = [m for m in found if m["adapter"] == adapter and m["counted"]]
        seconds = {s: statistics.median(m["seconds"] for m in measured if m["side"] == s) for s in sides}
        peaks = {s: max(m["peak_mb"] for m in measured if m["side"] == s) for s in sides}
        for side in sides:
            ratios = "  ".join(
                f"{seconds[side] / seconds[other]:.2f} x time, {peaks[side] / peaks[other]:.2f} x memory of {other}"
                for other in ("fused", "plain")
                if other in sides
            )
            print(f"{adapter} {dtype} {side:7} {seconds[side]:7.2f} s {peaks[side]:6} MB  {ratios}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
