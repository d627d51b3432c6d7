"""What a silo received last, so that it need not travel again (`fedlm.federation.versions` has the whole story).

One file for each verb of a run, `<root>/<silo>/<run>/received-<verb>.safetensors`, holds the last message of that verb,
whole. It is written when a message's digest is right, before anything is computed from it.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedlm.errors import UpdateRefused
from fedlm.federation.disk import disk_errors
from fedlm.federation.versions import (
    HELD,
    LISTED,
    MOVED,
    NAMES,
    PLAN,
    SENT,
    STEP,
    STEPPED,
    VERBS,
    WHOLE,
    content_hash,
    digest,
    downlink_key,
    moved,
)
from fedlm.files import read_tensors, write_tensors
from fedlm.guards import Chain
from fedlm.messages import Request, Tensors

PLACES = {code: (verb, kind is MOVED) for kind in (HELD, MOVED) for verb, code in kind.items()}
"""By code of a plan: in the last message of which verb, and whether a difference is added."""


class UnsyncedError(Exception):
    """This silo does not hold what the message builds on."""


class Received:
    """The last messages to one silo.

    Args:
        folder: the silo's private folder.
        chain: the guards of the way down; None without any.
        seed: the run's.
    """

    def __init__(self, folder: Path, chain: Chain | None, seed: int) -> None:
        self._folder, self._chain, self._seed = folder, chain, seed

    def complete(self, request: Request) -> Request:
        """The request as if everything had travelled, which is kept. One without a digest is taken as it is.

        Raises:
            UnsyncedError: the silo holds other things than the coordinator thinks; nothing is stored.
            RunError: the disk is full or read-only.
        """
        fields = dict(request.fields)
        whole, listed, step = (fields.pop(name, None) for name in (WHOLE, LISTED, STEPPED))
        if whole is None:
            return request
        file, known = self._file(request.run, request.verb), False
        try:
            if PLAN not in request.tensors:
                tensors = dict(request.tensors)
            elif known := _digest_of(file) == whole:  # a repeated message, or one of a run that was put back
                tensors = read_tensors(file)
            else:
                tensors = self._assembled(request, listed, step)
            right = digest({name: content_hash(tensor) for name, tensor in tensors.items()}) == whole
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, UpdateRefused) as error:
            raise UnsyncedError(f"what this silo holds does not fit the message ({type(error).__name__})") from None
        if not right:
            raise UnsyncedError("what this silo holds is not what the message builds on")
        if not known:
            with disk_errors(file, "silo's state"):
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                file.parent.mkdir(mode=0o700, exist_ok=True)
                write_tensors(file, tensors, {WHOLE: whole})
                file.chmod(0o600)
        return replace(request, tensors=tensors, fields=fields)

    def _assembled(self, request: Request, listed: Any, step: Any) -> Tensors:
        """The whole message, from what was sent and what is held."""
        sent, held = request.tensors, dict[str, Tensors]()

        def last(verb: Any) -> Tensors:
            if verb not in VERBS:
                raise ValueError("there is no such verb")
            if verb not in held:
                held[verb] = read_tensors(self._file(request.run, verb))
            return held[verb]

        names = json.loads(sent[NAMES].numpy().tobytes()) if listed is None else sorted(last(listed))
        tensors: Tensors = {}
        before: Tensors = {}
        for name, code in zip(names, sent[PLAN].tolist(), strict=True):
            if code == SENT:
                tensors[name] = sent[name]
            else:
                verb, moves = PLACES[code]
                (before if moves else tensors)[name] = last(verb)[name]
        if before:
            if self._chain is None:
                raise ValueError("no guards are agreed on for the way down")
            payload = {name.removeprefix(STEP): part for name, part in sent.items() if name.startswith(STEP)}
            shapes = {name: tensor.shape for name, tensor in before.items()}
            tensors |= moved(before, self._chain.decode(payload, shapes, downlink_key(self._seed, int(step))))
        return tensors

    def _file(self, run: str, verb: str) -> Path:
        return self._folder / run / f"received-{verb}.safetensors"


def _digest_of(file: Path) -> str | None:
    """Of the message in a file; None where there is no file, or a damaged one, which nothing is taken from then."""
    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get(WHOLE)
    except (OSError, SafetensorError):
        return None
