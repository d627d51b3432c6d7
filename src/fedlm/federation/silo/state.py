"""A silo's private state between rounds: algorithm variates, optimiser moments, what guards have yet to make up for,
and the replies it has already given.

Each round of a run is one file, `<root>/<silo>/<run>/round-NNNN.safetensors`, written atomically before the reply
leaves: the state after training and the reply commit together or not at all. Two rounds are kept, the one just trained
and the one it started from: round t is final only when the request for a later round says so (`accepted`), because the
coordinator may have been killed, or may have refused the update, in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from fedlm.errors import RunError
from fedlm.files import write_tensors
from fedlm.messages import Fields, Request, Tensors

RULE, OPTIMIZER, GUARD, REPLY = "rule/", "optimizer/", "guard/", "reply/"


@dataclass
class Trained:
    """What one round left in the silo."""

    key: str
    """The request's idempotency key."""
    digest: str
    """SHA-256 of the request's content."""
    rule: Tensors
    optimizer: Tensors
    guard: Tensors
    """Error feedback: what was lost on the way so far."""
    reply: Tensors
    fields: Fields


def request_key(request: Request) -> str:
    dispatch = f"/{request.fields['dispatch']}" if "dispatch" in request.fields else ""
    return f"{request.run}/{request.round}/{request.attempt}/{request.silo}/{request.verb}{dispatch}"


def request_digest(request: Request) -> str:
    """SHA-256 over what the silo was asked to compute: tensors (names, types, shapes, bytes) and fields."""
    return tensors_digest(request.tensors, json.dumps(request.fields, sort_keys=True))


def tensors_digest(tensors: Tensors, beside: str = "") -> str:
    """SHA-256 over a text and tensors: names, types, shapes, bytes."""
    state = hashlib.sha256(beside.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"\x1f{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


class StateStore:
    """The private states of one silo, for any number of runs."""

    def __init__(self, root: Path, silo: str) -> None:
        self.folder = root / silo

    def load(self, run: str, round_: int) -> Trained | None:
        """What the silo kept of a round, or None.

        Raises:
            RunError: the file is damaged.
        """
        file = self._file(run, round_)
        if not file.exists():
            return None
        parts: dict[str, Tensors] = {RULE: {}, OPTIMIZER: {}, GUARD: {}, REPLY: {}}
        try:
            with safe_open(file, framework="pt") as handle:
                note = json.loads((handle.metadata() or {})["note"])
                if note.get("names", sorted(handle.keys())) != sorted(handle.keys()):
                    raise ValueError("other tensors than were stored")
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    prefix = name.split("/", 1)[0] + "/"
                    parts[prefix][name.removeprefix(prefix)] = handle.get_tensor(name)
            key, digest, fields = str(note["key"]), str(note["digest"]), dict(note["fields"])
        except Exception as error:
            raise RunError("the silo's stored state is corrupt", where=str(file)) from error
        rule, optimizer, guard, reply = parts.values()
        return Trained(key, digest, rule, optimizer, guard, reply, fields)

    def save(self, run: str, round_: int, trained: Trained) -> None:
        """Store a round's state and reply, readable by the owner only."""
        file = self._file(run, round_)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.parent.mkdir(mode=0o700, exist_ok=True)
        tensors: Tensors = {}
        held: set[int] = set()
        parts = {RULE: trained.rule, OPTIMIZER: trained.optimizer, GUARD: trained.guard, REPLY: trained.reply}
        for prefix, part in parts.items():
            for name, tensor in part.items():
                # A state may be the very tensor that is sent; the file format wants each memory once.
                shared = tensor.data_ptr() in held
                held.add(tensor.data_ptr())
                tensors[prefix + name] = tensor.clone() if shared else tensor
        note = {"key": trained.key, "digest": trained.digest, "fields": trained.fields, "names": sorted(tensors)}
        write_tensors(file, tensors, {"note": json.dumps(note)})
        file.chmod(0o600)

    def keep_only(self, run: str, rounds: Iterable[int]) -> None:
        """Forget every other round of this run."""
        keep = {self._file(run, r) for r in rounds}
        for file in self._file(run, 0).parent.glob("round-*.safetensors"):
            if file not in keep:
                file.unlink(missing_ok=True)  # this silo may be at work in two processes, in one of them in vain

    def _file(self, run: str, round_: int) -> Path:
        return self.folder / run / f"round-{round_:04d}.safetensors"
