"""One silo's steps shared by several processes or devices: data parallelism by torch.distributed, on one machine.

The silo's own process is rank 0. It keeps the door, the algorithm's rule, the optimiser and the spike guard; the other
ranks hold a replica of the model and nothing that lasts. In each step rank 0 broadcasts the trained values and the
batch, every rank computes the gradient of its share, and the sum comes back by an all-reduce. That is the arithmetic of
DistributedDataParallel with as many bytes (a broadcast and a reduction for each of its all-reduces), but whatever a
rule does to gradients or weights happens once, in rank 0, and moments exist once.

A step's loss is divided by the targets of its whole batch, so the result is that of one process up to the order of
sums; dropout draws differ, as they do between sizes of a forward pass.

Values pass through the CPU (gloo, on the loopback device alone). Helpers are started once and wait on their standard
input between rounds; when rank 0 is gone they end. A helper that dies or hangs is a `TrainingError`, and the next
training starts new ones.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fedlm.errors import TrainingError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AdapterSpec, ModelSpec, TrainingSpec
from fedlm.training.group import SECONDS, Group
from fedlm.training.objective import Likelihood, Objective, Tools, sequences_of
from fedlm.training.sequences import Example

LINE = 1 << 22
"""Bytes of a command's line at most."""


class Flat:
    """The trained parameters' values, or their gradients, end to end in one fp32 buffer on the CPU."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self.parameters = parameters
        self.ends = np.cumsum([0, *(p.numel() for p in parameters)]).tolist()
        self.buffer = torch.zeros(self.ends[-1] + len(parameters))
        """Behind the values, for each parameter how many ranks have a gradient of it."""

    @property
    def values(self) -> Tensor:
        return self.buffer[: self.ends[-1]]

    def slices(self) -> Iterator[tuple[Parameter, Tensor, int]]:
        for index, parameter in enumerate(self.parameters):
            start, end = self.ends[index], self.ends[index + 1]
            yield parameter, self.buffer[start:end].view(parameter.shape), self.ends[-1] + index

    @torch.no_grad()
    def read_values(self) -> None:
        for parameter, place, _ in self.slices():
            place.copy_(parameter)

    @torch.no_grad()
    def write_values(self) -> None:
        for parameter, place, _ in self.slices():
            parameter.copy_(place)

    def read_gradients(self) -> None:
        for parameter, place, count in self.slices():
            self.buffer[count] = parameter.grad is not None
            if parameter.grad is None:
                place.zero_()
            else:
                place.copy_(parameter.grad)

    def write_gradients(self) -> None:
        """A parameter of which no rank has a gradient is left without one."""
        for parameter, place, count in self.slices():
            if self.buffer[count] == 0:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = place.to(parameter.device, parameter.dtype, copy=True)
            else:
                parameter.grad.copy_(place)


class Team:
    """A silo's helpers, seen from rank 0.

    Args:
        model: the base model in the type of weights that rank 0 has.
        processes: rank 0 included; with several GPUs, helpers take turns on the others.
        threads: torch's, of each.
        sharded: helpers hold a part of the model (see `fedlm.training.sharded`).

    Raises:
        TrainingError: a helper cannot load the model.
    """

    def __init__(
        self,
        model: ModelSpec,
        adapter: AdapterSpec,
        seed: int,
        processes: int,
        threads: int,
        *,
        sharded: bool = False,
    ) -> None:
        self.closed = False
        folder = tempfile.TemporaryDirectory(prefix="fedlm-team-")
        self._helpers: list[subprocess.Popen[bytes]] = []
        self._end = weakref.finalize(self, _end, self._helpers, folder)
        self.store = Path(folder.name) / "store"
        start = {
            "model": model.model_dump(mode="json"),
            "adapter": adapter.model_dump(mode="json"),
            "seed": seed,
            "store": str(self.store),
            "size": processes,
            "threads": threads,
            "sharded": sharded,
        }
        try:
            for rank in range(1, processes):
                self._helpers.append(_spawn(rank, threads))
                self._tell(self._helpers[-1], {**start, "rank": rank})
            for helper in self._helpers:  # the model is loaded; only now can all meet
                assert helper.stdout is not None
                ready, _, _ = select.select([helper.stdout], [], [], SECONDS)
                if not ready or not helper.stdout.readline():
                    raise self._fault()
            with self._faults():
                self._group = Group(self.store, 0, processes)
        except BaseException:
            self.close()
            raise

    @property
    def helpers(self) -> list[int]:
        """Their process ids."""
        return [helper.pid for helper in self._helpers]

    def close(self) -> None:
        """End the helpers."""
        self.closed = True
        self._end()

    def load(self, tensors: Tensors) -> None:
        """Make the helpers' models what rank 0's is.

        Args:
            tensors: with an adapter all its values and deltas; of full weights those that are not trained.
        """
        content = safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        with self._faults():
            self._command({"do": "load", "bytes": len(content)})
            self._group.broadcast(torch.frombuffer(bytearray(content), dtype=torch.uint8))

    @contextmanager
    def round(
        self, parameters: dict[str, Parameter], spec: TrainingSpec, key: tuple[str | int, ...], round_: int
    ) -> Iterator[None]:
        """Inside, `begin` and `add` share steps over these parameters. What is raised inside ends the helpers, who
        would wait for the rest of a step.

        Args:
            key: of the dropout's draws, as `fedlm.training.loop.seeded` takes it.
        """
        self._flat = Flat(list(parameters.values()))
        try:
            with self._faults():
                told = {"spec": spec.model_dump(mode="json"), "key": list(key), "round": round_}
                self._command({"do": "round", "parameters": list(parameters), **told})
            yield
            with self._faults():
                self._group.tell([])
        except BaseException:
            self.close()
            raise
        finally:
            del self._flat

    def passes(self, examples: Sequence[Example], spec: TrainingSpec) -> Iterable[list[Example]]:
        """A step begins. Returns rank 0's part of its forward passes."""
        from fedlm.training.loop import micro_batches

        return micro_batches(self.begin(examples), spec)

    def begin(self, examples: Sequence[Example]) -> list[Example]:
        """A step: the others get the trained values and the whole batch. Returns rank 0's share, never empty."""
        sequences = sequences_of(examples)
        with self._faults():
            self._group.tell(sequences)
            self._flat.read_values()
            self._group.broadcast(self._flat.values)
        return self._group.share(sequences)

    def add(self, total: float) -> float:
        """All shares are done: gradients are summed over them. Returns the sum of `total` over all ranks."""
        with self._faults():
            return _sum(self._group, self._flat, total)

    def norm(self, norm: Tensor) -> Tensor:
        """The gradient's norm, from that of the gradients that rank 0 has: here all of them."""
        return norm

    def decide(self, rate: float, taken: bool) -> None:
        """The step is taken with this learning rate, or left out: here by rank 0 alone, so nobody is told."""

    def _command(self, message: dict[str, Any]) -> None:
        for helper in self._helpers:
            self._tell(helper, message)

    def _tell(self, helper: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        assert helper.stdin is not None
        try:
            helper.stdin.write(json.dumps(message).encode() + b"\n")
            helper.stdin.flush()
        except OSError:
            raise self._fault() from None

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # of torch.distributed
            raise self._fault() from None

    def _fault(self) -> TrainingError:
        """What became of the helpers; ends them."""
        codes = []
        for helper in self._helpers:
            with suppress(subprocess.TimeoutExpired):
                codes.append(helper.wait(timeout=1.0))
        self.close()
        fix = "see this process's log; with too little memory, train with fewer processes"
        if not codes:
            return TrainingError(f"a process that shares this silo's training was silent for {SECONDS:g} s", fix=fix)
        code = min(codes)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return TrainingError(f"a process that shares this silo's training ended ({how})", fix=fix)


def _spawn(rank: int, threads: int) -> subprocess.Popen[bytes]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    gpu = {"CUDA_VISIBLE_DEVICES": visible[rank % count] if visible else str(rank % count)} if count > 1 else {}
    number = str(threads)
    return subprocess.Popen(
        [sys.executable, "-m", "fedlm.training.parallel"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": number, "MKL_NUM_THREADS": number, **gpu},
        start_new_session=True,  # Ctrl-C reaches rank 0, which ends the others
    )


def _end(helpers: list[subprocess.Popen[bytes]], folder: tempfile.TemporaryDirectory[str]) -> None:
    for helper in helpers:
        helper.kill()
    for helper in helpers:
        helper.wait()
        for pipe in (helper.stdin, helper.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
    folder.cleanup()


def _sum(group: Group, flat: Flat, total: float) -> float:
    flat.read_gradients()
    group.sum(flat.buffer)
    flat.write_gradients()
    return float(group.sum(torch.tensor([total], dtype=torch.float64)))


# ---------------------------------------------------------------- in a helper


def main() -> None:
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    if start := next_command(sys.stdin.buffer):
        torch.set_num_threads(start["threads"])
        if start["sharded"]:
            from fedlm.training import sharded

            sharded.help_out(start, sys.stdin.buffer, out)
        else:
            help_out(start, sys.stdin.buffer, out)


def next_command(commands: BinaryIO) -> dict[str, Any]:
    """What rank 0 says next; nothing when it is gone."""
    line = commands.readline(LINE)
    return dict(json.loads(line)) if line else {}


def help_out(start: dict[str, Any], commands: BinaryIO, out: int) -> None:
    """Compute shares of steps until rank 0 is gone.

    Args:
        start: what `Team` says.
        out: where rank 0 is told that the model is loaded.
    """
    from fedlm.models.adapters import adapter_parameters, attach, set_tensors
    from fedlm.models.load import load_base

    adapter = AdapterSpec.model_validate(start["adapter"])
    base = load_base(ModelSpec.model_validate(start["model"]))
    model = attach(base, adapter, start["seed"])
    os.write(out, b"ready\n")
    group = Group(Path(start["store"]), start["rank"], start["size"])
    while command := next_command(commands):
        if command["do"] == "load":
            content = group.broadcast(torch.empty(command["bytes"], dtype=torch.uint8)).numpy().tobytes()
            tensors = safetensors.torch.load(content)
            if adapter.kind == "full":
                with torch.no_grad():
                    named = adapter_parameters(model)
                    for name, value in tensors.items():
                        named[name].copy_(value)
            else:
                set_tensors(model, tensors, adapter)
        else:
            _round(model, group, command)


def backward(objective: Objective, parts: Iterable[list[Example]]) -> float:
    """The gradients of these parts of a step; returns their share of the loss, not divided."""
    total = 0.0
    for part in parts:
        terms, divisor = objective.terms(part)
        loss = terms.sum() / divisor
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) * divisor
    return total


def _round(model: nn.Module, group: Group, command: dict[str, Any]) -> None:
    from fedlm.models.adapters import adapter_parameters
    from fedlm.training.forward import model_device
    from fedlm.training.loop import micro_batches, seeded, training_mode

    spec = TrainingSpec.model_validate(command["spec"])
    named = adapter_parameters(model)
    for name, parameter in named.items():
        parameter.requires_grad_(name in command["parameters"])
    flat = Flat([named[name] for name in command["parameters"]])
    objective = Likelihood(Tools(model, spec))
    key = (*command["key"], "rank", group.rank)
    with training_mode(model, spec), seeded(key, command["round"], model_device(model)):
        while sequences := group.hear():
            group.broadcast(flat.values)
            flat.write_values()
            objective.begin([Example((sequence,)) for sequence in sequences])  # counts the whole batch's targets
            total = backward(objective, micro_batches(group.share(sequences), spec))
            _sum(group, flat, total)
            model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
