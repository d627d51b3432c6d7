"""Full weights in shards: one silo's processes or devices each hold a part of values, gradients and moments.

This is fully sharded data parallelism (ZeRO-3: Rajbhandari et al., SC 2020; FSDP: Zhao et al., VLDB 2023) by torch's
`fully_shard`. Rank r of P has the r-th part of the rows of every tensor. A decoder block's weights are gathered for its
forward and again for its backward pass, and its gradient is summed and parted at once; what lies outside of blocks
(embeddings, last norm, output matrix) stays gathered from a forward pass to the end of its backward pass. Each rank's
optimiser steps on its own part. A step's loss is divided by the targets of its whole batch, so the result is that of
one process up to the order of sums.

Rank 0 is the silo's own process. While a round trains, its model has no values: they are sent to the ranks tensor by
tensor, and come back so at the end, with the moments if they are kept. A second whole model never exists.

A rule that changes gradients or weights between steps would see a part of each tensor, so only plain training is done.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from fedlm.errors import TrainingError
from fedlm.messages import Tensors
from fedlm.recipe.schema import AdapterSpec, ModelSpec, TrainingSpec
from fedlm.training.encode import TokenSet
from fedlm.training.forward import model_device
from fedlm.training.group import Group
from fedlm.training.loop import (
    SPIKES,
    TrainResult,
    Window,
    load_optimizer_state,
    make_optimizer,
    save_optimizer_state,
    seeded,
    train,
    training_mode,
)
from fedlm.training.objective import Tools, sequences_of
from fedlm.training.parallel import Team, backward, next_command
from fedlm.training.sequences import Example
from fedlm.training.shards import Gathered, Shards, join, leave, rows


def train_sharded(
    model: nn.Module,
    parameters: dict[str, Parameter],
    data: TokenSet,
    spec: TrainingSpec,
    window: Window,
    *,
    generator_key: tuple[str | int, ...],
    team: ShardedTeam,
    optimizer_state: Tensors | None = None,
    **others: Any,
) -> TrainResult:
    """`fedlm.training.loop.train` without a rule, from the values that `model` has, which it then has as trained.

    Args:
        others: as `train` takes them.

    Raises:
        TrainingError: as `train`.
    """
    kept = dict(optimizer_state or {})
    spikes = {SPIKES: kept.pop(SPIKES)} if SPIKES in kept else {}
    with team.parted(model, parameters, spec, (generator_key, window.round), kept) as (shards, values, pieces):
        pieces |= spikes
        result = train(
            shards.model,
            values,
            data,
            spec,
            window,
            generator_key=generator_key,
            rule=None,
            objective=Gathered(Tools(shards.model, spec), shards.whole),
            optimizer_state=pieces,
            team=team,
            **others,
        )
        team.collect(result.optimizer_state)
    return result


class ShardedTeam(Team):
    """A silo's helpers that hold shards, seen from rank 0. Arguments and errors are `Team`'s.

    Args:
        replica: rank 0's model.
    """

    def __init__(
        self, model: ModelSpec, adapter: AdapterSpec, seed: int, processes: int, threads: int, replica: nn.Module
    ) -> None:
        device = model_device(replica)
        if device.type == "cuda" and torch.cuda.device_count() < processes:
            raise TrainingError(
                f"{processes} shards need as many GPUs, and this machine has {torch.cuda.device_count()}",
                fix="set `shards` in the silo's capacity to the number of GPUs",
            )
        if dist.is_initialized():
            gc.collect()  # a team that nobody has any more may wait for its end
        if dist.is_initialized():
            raise TrainingError(
                "this process is part of another group of torch.distributed, and there can be only one",
                fix="end the training that has it first",
            )
        super().__init__(model, adapter, seed, processes, threads, sharded=True)
        self._leave = weakref.finalize(self, leave)
        try:
            with self._faults():
                mesh = join(self.store, 0, processes, device)
            self._shards = Shards(replica, self._group, mesh, device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self.__dict__.pop("_shards", None)
        if hasattr(self, "_leave"):
            self._leave()

    @contextmanager
    def parted(
        self,
        model: nn.Module,
        trained: Mapping[str, Parameter],
        spec: TrainingSpec,
        key: tuple[tuple[str | int, ...], int],
        kept: Tensors,
    ) -> Iterator[tuple[Shards, dict[str, Parameter], Tensors]]:
        """Send the model's values and the kept moments to all ranks. Inside, a model's trained parameters are empty;
        `collect` fills them again. What is raised inside ends the helpers.

        Returns:
            Rank 0's shards, of them those that are trained, and its pieces of the moments.
        """
        shards, shapes = self._shards, {name: p.shape for name, p in trained.items()}
        told = {"spec": spec.model_dump(mode="json"), "key": list(key[0]), "round": key[1]}
        slots = {slot: list(value.shape) for slot, value in kept.items()}
        try:
            self._command({"do": "round", "parameters": list(trained), "slots": slots, **told})
            shards.begin()
            values = shards.values
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    values[name].copy_(self._part(parameter.detach().to("cpu", torch.float32)))
                    if name in trained:
                        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            self._pieces = {slot: self._part(value.to(torch.float32)) for slot, value in kept.items()}
            shards.check(spec)
            self._trained = {name: values[name] for name in trained}
            self._model = dict(model.named_parameters())
            yield shards, self._trained, self._pieces
        except BaseException as error:
            ended = isinstance(error, RuntimeError) and self._ended()
            self.close()
            for name, shape in shapes.items():
                parameter = trained[name]
                if parameter.shape != shape:
                    parameter.data = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
            if ended:
                raise self._fault() from None
            raise
        finally:
            for held in ("_trained", "_model", "_pieces"):
                self.__dict__.pop(held, None)

    @contextmanager
    def round(self, *_: Any) -> Iterator[None]:
        """The steps, inside of `parted`, which has said all that there is to say."""
        self._pieces.clear()  # the optimiser has copies
        yield
        self._group.tell([])

    def passes(self, examples: Sequence[Example], spec: TrainingSpec) -> Iterable[list[Example]]:
        sequences = sequences_of(examples)
        self._group.tell(sequences)
        return self._shards.passes(sequences, spec)

    def add(self, total: float) -> float:
        self._shards.take_gradients(self._trained)
        return float(self._group.sum(torch.tensor([total], dtype=torch.float64)))

    def norm(self, norm: Tensor) -> Tensor:
        return self._shards.norm(norm)

    def decide(self, rate: float, taken: bool) -> None:
        self._group.broadcast(torch.tensor([rate, taken], dtype=torch.float64))

    def collect(self, state: Tensors) -> None:
        """Fill the model with the trained values, and put whole moments in place of rank 0's pieces."""
        for name, shard in self._trained.items():
            self._model[name].data = self._joined(shard, self._shards.shapes[name], self._model[name].device)
        for slot, piece in state.items():
            if slot != SPIKES and piece.ndim:
                shape = self._shards.shapes[slot.rpartition("/")[0]]
                state[slot] = self._joined(piece, shape, torch.device("cpu"))

    def _part(self, tensor: Tensor) -> Tensor:
        """Send the others their rows, and return rank 0's; a scalar goes to all."""
        cut = [
            tensor[rows(tensor.shape, rank, self._group.size)] if tensor.ndim else tensor
            for rank in range(self._group.size)
        ]
        for rank, part in enumerate(cut[1:], 1):
            self._group.send(part, rank)
        return cut[0].clone()

    def _joined(self, own: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
        """A whole fp32 tensor of rank 0's rows and of those that the others send."""
        whole = torch.empty(shape)
        whole[rows(shape, 0, self._group.size)] = own.detach().cpu()
        for rank in range(1, self._group.size):
            self._group.receive(whole[rows(shape, rank, self._group.size)], rank)
        return whole.to(device)

    def _ended(self) -> bool:
        """Whether a helper is gone, or about to go."""
        with suppress(Exception):
            self._helpers[0].wait(timeout=1.0)
        return any(helper.poll() is not None for helper in self._helpers)


# ---------------------------------------------------------------- in a helper


def help_out(start: dict[str, Any], commands: BinaryIO, out: int) -> None:
    """Hold a shard until rank 0 is gone. Arguments are those of `fedlm.training.parallel.help_out`."""
    from fedlm.models.load import load_base, pick_device

    spec = ModelSpec.model_validate(start["model"])
    device = pick_device(spec.device)
    base = load_base(spec, device="cpu")  # mapped from its file, and never read
    os.write(out, b"ready\n")
    group = Group(Path(start["store"]), start["rank"], start["size"])
    mesh = join(Path(start["store"]), start["rank"], start["size"], device)
    shards = Shards(base, group, mesh, device)
    del base
    while command := next_command(commands):
        _round(shards, group, command)


def _round(shards: Shards, group: Group, command: dict[str, Any]) -> None:
    spec = TrainingSpec.model_validate(command["spec"])
    shards.begin()
    values = shards.values
    with torch.no_grad():
        for shard in values.values():
            shard.copy_(group.receive(torch.empty(shard.shape), 0))
    own = {name: values[name] for name in command["parameters"]}
    moments: Tensors = {}
    for slot, shape in command["slots"].items():
        piece = torch.empty(own[slot.rpartition("/")[0]].shape if shape else ())
        moments[slot] = group.receive(piece, 0)
    shards.check(spec)
    optimizer = make_optimizer(spec, own)
    load_optimizer_state(optimizer, own, moments)
    moments.clear()
    objective = Gathered(Tools(shards.model, spec), shards.whole)
    key = (*command["key"], "rank", group.rank)
    with training_mode(shards.model, spec), seeded(key, command["round"], model_device(shards.model)):
        while sequences := group.hear():
            objective.begin([Example((sequence,)) for sequence in sequences])  # counts the whole batch's targets
            total = backward(objective, shards.passes(sequences, spec))
            shards.take_gradients(own)
            group.sum(torch.tensor([total], dtype=torch.float64))
            norm = shards.norm(torch.nn.utils.get_total_norm([p.grad for p in own.values() if p.grad is not None]))
            rate, taken = group.broadcast(torch.empty(2, dtype=torch.float64)).tolist()
            if taken:
                for one in optimizer.param_groups:
                    one["lr"] = rate
                if spec.clip_norm is not None:
                    torch.nn.utils.clip_grads_with_norm_(own.values(), spec.clip_norm, norm)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for shard in own.values():
        group.send(shard.detach().cpu(), 0)
    if spec.keep_optimizer:
        for piece in save_optimizer_state(optimizer, own).values():
            if piece.ndim:
                group.send(piece, 0)
