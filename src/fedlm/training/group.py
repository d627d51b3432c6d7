"""What the processes that share one silo's training tell each other: gloo, on one machine's loopback device alone."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fedlm.training.sequences import Encoded, Example

SECONDS = 600.0
"""A helper that takes longer, to load the model or in one step, counts as hung."""

END = -1
"""In place of a batch's size: the round is over."""


class Group:
    """The collectives of all ranks."""

    def __init__(self, store: Path, rank: int, size: int) -> None:
        gloo: Any = dist.ProcessGroupGloo  # torch's own stubs leave out what it has
        options = gloo._Options()
        options._timeout = datetime.timedelta(seconds=SECONDS)
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        self.rank, self.size = rank, size
        self._gloo = gloo(torch._C._distributed_c10d.FileStore(str(store), size), rank, size, options)

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's values, everywhere; in place."""
        if tensor.numel():
            self._gloo.broadcast([tensor], dist.BroadcastOptions()).wait()
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, everywhere; in place."""
        self._gloo.allreduce([tensor]).wait()
        return tensor

    def send(self, tensor: Tensor, rank: int) -> None:
        """To that rank, which calls `receive` with as many numbers of the same type."""
        if tensor.numel():
            self._gloo.send([tensor.contiguous()], rank, 0).wait()

    def receive(self, tensor: Tensor, rank: int) -> Tensor:
        """From that rank; in place."""
        if tensor.numel():
            self._gloo.recv([tensor], rank, 0).wait()
        return tensor

    def tell(self, sequences: Sequence[Encoded]) -> None:
        """From rank 0, a step's whole batch, or with none that the round is over."""
        if not sequences:
            self.broadcast(torch.tensor([END, 0]))
            return
        self.broadcast(torch.tensor([len(sequences), sum(len(s) for s in sequences)]))
        self.broadcast(torch.tensor([len(s) for s in sequences]))
        self.broadcast(torch.from_numpy(np.concatenate([s.ids for s in sequences]).astype(np.int32)))
        self.broadcast(torch.from_numpy(np.concatenate([s.loss for s in sequences]).astype(np.uint8)))

    def hear(self) -> list[Encoded]:
        """What rank 0 tells."""
        count, tokens = self.broadcast(torch.zeros(2, dtype=torch.int64)).tolist()
        if count == END:
            return []
        ends = np.cumsum(self.broadcast(torch.empty(count, dtype=torch.int64)).numpy())[:-1]
        ids = np.split(self.broadcast(torch.empty(tokens, dtype=torch.int32)).numpy(), ends)
        loss = np.split(self.broadcast(torch.empty(tokens, dtype=torch.uint8)).numpy().astype(np.bool_), ends)
        return [Encoded(*pair) for pair in zip(ids, loss, strict=True)]

    def share(self, sequences: Sequence[Encoded]) -> list[Example]:
        """This rank's part of a batch."""
        return [Example((sequence,)) for sequence in sequences[self.rank :: self.size]]
