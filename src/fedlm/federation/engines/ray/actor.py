"""A worker of the Ray engine: an actor that holds the base model and answers requests for any simulated silo.

Imports no torch at the top, so that an actor is up, and can say what is wrong with its machine, before it loads any.
"""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedlm
from fedlm.errors import FedlmError
from fedlm.messages import Event, Fields, Reply, Request, Tensors

if TYPE_CHECKING:
    from torch import Tensor

    from fedlm.federation.silo import Workbench

Packed = dict[str, tuple[str, list[int], Any]]
"""Tensors as Ray moves them without copies: by name the type, the shape and the bytes as a NumPy array."""


def versions() -> dict[str, str]:
    """What must be the same on every machine for the same bits. Torch's builds for CPU and CUDA count as one."""
    return {"fedlm": fedlm.__version__, "torch": version("torch").split("+")[0], "python": platform.python_version()}


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Views of the tensors' bytes where they lie in this machine's memory, so bf16 travels too."""
    import torch

    packed: Packed = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        data = plain.reshape(-1).view(torch.uint8).numpy()
        packed[name] = (str(plain.dtype).removeprefix("torch."), list(plain.shape), data)
    return packed


def unpack(packed: Packed) -> Tensors:
    """Tensors over the very memory that Ray shares between the processes of a machine: to be read, never written."""
    import torch

    tensors: Tensors = {}
    with _unwritable, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that is not writable; nothing here writes to it
        for name, (dtype, shape, data) in packed.items():
            tensors[name] = torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
    return tensors


_unwritable = threading.Lock()
"""Filters of warnings belong to the whole process."""


class SiloWorker:
    """Runs as a Ray actor: requests one after another, `events` and `cancel` beside them (group 'control')."""

    def __init__(self) -> None:
        self._bench: Workbench | None = None
        self._states = Path()
        self._events: deque[Event] = deque()
        self._cancelled: set[int] = set()

    def greet(self, states: str, mark: str) -> Fields:
        """Who this worker is, and whether it sees the run directory: the same file with the same content."""
        import ray

        try:
            sees = (Path(states) / f".{mark}").read_text() == mark
        except OSError:
            sees = False
        node = ray.util.get_node_ip_address()
        return {"pid": os.getpid(), "node": node, "sees": sees, "versions": versions()}

    def load(self, recipe: Fields, base: str, states: str) -> Fields | None:
        """Load the model and the data. What the user can mend comes back as the fields of a FedlmError."""
        from fedlm.data.federated import load_data
        from fedlm.federation.silo import Workbench
        from fedlm.recipe.schema import Recipe

        try:
            parsed = Recipe.model_validate(recipe)
            bench = Workbench(parsed, load_data(parsed, Path(base)))
            bench.load()
        except FedlmError as error:
            return {"error": type(error).__name__, "what": error.what, "where": error.where, "fix": error.fix}
        self._bench, self._states = bench, Path(states)
        return None

    def handle(self, job: int, head: Fields, packed: Packed) -> tuple[Fields, Packed]:
        """Answer one request: the answer's fields with the progress events not yet fetched, and its tensors."""
        from fedlm.federation.engines.wire import serialized_size
        from fedlm.federation.silo import Silo

        assert self._bench is not None
        request = Request(**head, tensors=unpack(packed))
        silo = Silo(
            request.silo,
            self._bench,
            self._states,
            observe=self._events.append,
            should_stop=lambda: job in self._cancelled,
        )
        answer = silo.handle(request)
        self._cancelled.discard(job)
        if isinstance(answer, Reply):
            fields = {"fields": answer.fields, "size": serialized_size(answer.tensors), "events": self.events()}
            return fields, pack(answer.tensors)
        return {"failure": answer.kind.value, "reason": answer.reason, "events": self.events()}, {}

    def events(self) -> list[Event]:
        """Progress events since the last call."""
        found = []
        while self._events:
            found.append(self._events.popleft())
        return found

    def cancel(self, job: int) -> None:
        """Stop this job at its next optimiser step, now or when it begins."""
        self._cancelled.add(job)
