"""One silo as a process of its own: length-prefixed safetensors and JSON come in by standard input and go out by
standard output; its state lies in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from fedlm.errors import AggregationRefused
from fedlm.privacy.secagg import Message, Policy, Silo
from fedlm.privacy.secagg.identity import Ed25519Directory, Ed25519Signer
from fedlm.privacy.secagg.state import from_bytes, to_bytes
from tests.privacy.secagg.parties import TRUSTING, identity


def receive(stream) -> bytes | None:  # type: ignore[no-untyped-def]
    size = stream.read(8)
    return stream.read(int.from_bytes(size, "big")) if size else None


def send(stream, data: bytes) -> None:  # type: ignore[no-untyped-def]
    stream.write(len(data).to_bytes(8, "big") + data)
    stream.flush()


def main(name: str, file: Path, public: str, seed: int, top: int) -> None:
    keys = {silo: bytes.fromhex(key) for silo, key in json.loads(public).items()}
    silo = Silo(name, Ed25519Signer(identity(name)), Ed25519Directory(keys), Policy(TRUSTING))
    while (arrays := receive(sys.stdin.buffer)) is not None:
        head = json.loads(receive(sys.stdin.buffer) or b"")
        request = Message(safetensors.numpy.load(arrays), head["fields"])
        state = from_bytes(file.read_bytes()) if file.exists() else None
        try:
            if head["phase"] == "train":
                assert state is not None
                values = np.random.default_rng(seed).integers(0, top, state.parameters.length, dtype=np.uint32)
                after, reply = silo.train(state, request, values)
            else:
                after, reply = getattr(silo, head["phase"])(state, request)
        except AggregationRefused as error:
            after, reply = state, Message({}, {"refused": error.sentence()})
        if after is not None:
            file.touch(0o600)
            file.write_bytes(to_bytes(after))
        send(sys.stdout.buffer, safetensors.numpy.save(reply.arrays))
        send(sys.stdout.buffer, json.dumps(reply.fields).encode())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
