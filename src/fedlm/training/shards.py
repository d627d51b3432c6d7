"""One rank's part of a model with full weights, by torch's `fully_shard`."""

from __future__ import annotations

import copy
import ctypes
import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.modeling_layers import GradientCheckpointingLayer

from fedlm.errors import TrainingError
from fedlm.recipe.schema import TrainingSpec
from fedlm.training.attention import packed
from fedlm.training.group import SECONDS, Group
from fedlm.training.loop import micro_batches
from fedlm.training.objective import Likelihood, Tools
from fedlm.training.sequences import Encoded, Example

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


MAPPED = 1 << 20
"""Bytes from which a block of memory is mapped by itself, and given back when it is freed."""


class Whole(nn.Module):
    """Around a model whose blocks are sharded: what runs inside its forward finds everything outside of blocks whole.

    fedlm calls parts of a model (its blocks without the output matrix), where FSDP gathers at the call of a whole.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Any) -> Any:
        return work()


class Gathered(Likelihood):
    """The likelihood, inside of `Whole`."""

    def __init__(self, tools: Tools, whole: Whole) -> None:
        super().__init__(tools)
        self.whole = whole

    def terms(self, part: Sequence[Example]) -> tuple[Tensor, float]:
        return self.whole(partial(super().terms, part))  # type: ignore[no-any-return]


class Shards:
    """One rank's part of a model.

    Args:
        model: gives modules and shapes; its values are neither read nor kept.
        device: of this rank.

    Raises:
        TrainingError: the model has no decoder blocks to gather one by one.
    """

    def __init__(self, model: nn.Module, group: Group, mesh: DeviceMesh, device: torch.device) -> None:
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if device.type == "cpu":
            _give_back()
        self._group = group
        self.model = _without_values(model)
        blocks = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not blocks:
            raise TrainingError(
                f"{type(model).__name__} has no blocks that transformers marks as layers, so it cannot be sharded",
                fix="take `shards` out of the silo's capacity",
            )
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.whole = Whole(self.model)
        for module in (*blocks, self.whole):
            fully_shard(module, mesh=mesh)
        self._sharded: list[Any] = [module for module in self.whole.modules() if isinstance(module, FSDPModule)]
        for module in self._sharded:
            # The loss is divided already. Gloo knows no multiplication beside a sum, so it has to be a plain sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        self.whole._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)  # type: ignore[no-untyped-call]
        self.model.to(device)  # buffers
        self._distributed: dict[str, Any] = dict(self.model.named_parameters())

    def begin(self) -> None:
        """Let go of what was gathered from values that are about to change."""
        for module in self._sharded:
            module.reshard()

    @property
    def values(self) -> dict[str, Parameter]:
        """This rank's rows of every tensor: parameters of their own over the memory that FSDP gathers from."""
        return {name: Parameter(p.to_local().detach()) for name, p in self._distributed.items()}

    def take_gradients(self, shards: Mapping[str, Parameter]) -> None:
        """Move what the passes of a step left to the parameters that the optimiser has."""
        for name, parameter in self._distributed.items():
            if name in shards:
                shards[name].grad = None if parameter.grad is None else parameter.grad.to_local()
            parameter.grad = None

    def check(self, spec: TrainingSpec) -> None:
        """What the first packed pass probes with passes of its own has to happen inside of `Whole`."""

        def probe() -> None:
            with packed(self.model):
                pass

        if spec.packing:
            with torch.no_grad():
                self.whole(probe)

    def passes(self, sequences: Sequence[Encoded], spec: TrainingSpec) -> list[list[Example]]:
        """This rank's part of a step's forward passes. All ranks do as many, since all take part in every gathering:
        who has fewer adds passes without a target, whose gradient is zero."""
        group = self._group
        cut = [
            list(micro_batches([Example((s,)) for s in sequences[rank :: group.size]], spec))
            for rank in range(group.size)
        ]
        filler = Example((Encoded(sequences[0].ids[:2], np.zeros(len(sequences[0].ids[:2]), np.bool_)),))
        own = cut[group.rank]
        return own + [[filler]] * (max(len(passes) for passes in cut) - len(own))

    def norm(self, own: Tensor) -> Tensor:
        """The whole gradient's norm, from that of this rank's part."""
        return self._group.sum(own.detach().to("cpu", torch.float64).square()).sqrt().to(torch.float32)


def rows(shape: torch.Size, rank: int, size: int) -> slice:
    """The rows of a tensor that a rank has, as `torch.chunk` cuts them; perhaps none.

    >>> [rows(torch.Size((5, 2)), rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    each = -(-shape[0] // size)
    return slice(min(rank * each, shape[0]), min((rank + 1) * each, shape[0]))


def join(store: Path, rank: int, size: int, device: torch.device) -> DeviceMesh:
    """Make this process part of the group of all ranks, which `fully_shard` needs as torch's default one.

    Gloo and NCCL meet on the loopback device alone.
    """
    from torch.distributed.device_mesh import init_device_mesh

    store_class: Any = dist.FileStore  # type: ignore[attr-defined]  # torch's stubs leave it out
    cuda = device.type == "cuda"
    loopback = next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, loopback))
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=store_class(f"{store}-shards", size),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=SECONDS),
        )
        return init_device_mesh(device.type, (size,))
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def leave() -> None:
    """Leave that group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _give_back() -> None:
    """Let the GNU C library map large blocks, for the rest of this process.

    Once a mapped block of up to 32 MB is freed, it takes the next ones of that size from its heap. What is gathered and
    freed block by block then leaves holes there that are larger than what sharding saves.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(-3, MAPPED)  # M_MMAP_THRESHOLD, which also ends its adjustment


def _without_values(model: nn.Module) -> nn.Module:
    """The same modules over fp32 parameters that have no values yet; ties stay ties."""
    memo: dict[int, Any] = {
        id(p): Parameter(torch.empty(p.shape, dtype=torch.float32, device="meta")) for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
