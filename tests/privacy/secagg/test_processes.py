"""Every silo is a process of its own that knows its key, its vector and what comes through its pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy

from fedlm.privacy.secagg import Coordinator, Message
from tests.privacy.secagg.parties import directory, identity, parameters
from tests.privacy.secagg.party import receive, send


class Party:
    """A silo's process, started anew whenever it was stopped; its state stays."""

    def __init__(self, name: str, folder: Path, public: str, seed: int, top: int) -> None:
        self._command = [
            sys.executable,
            "-m",
            "tests.privacy.secagg.party",
            name,
            str(folder / name),
            public,
            str(seed),
        ]
        self._command.append(str(top))
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, phase: str, request: Message) -> Message:
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        send(self._process.stdin, safetensors.numpy.save(request.arrays))
        send(self._process.stdin, json.dumps({"phase": phase, "fields": request.fields}).encode())
        arrays, fields = receive(self._process.stdout), receive(self._process.stdout)
        assert arrays is not None and fields is not None
        return Message(safetensors.numpy.load(arrays), json.loads(fields))

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def test_processes_of_which_one_is_killed_in_each_phase(tmp_path: Path) -> None:
    """Killed after it answered, it goes on from its file; asked again it says the same; the last one stays away."""
    of = parameters(4, threshold=3, malicious=True, length=1000, ring_bits=16)
    public = json.dumps({s: identity(s).public_key().public_bytes_raw().hex() for s in of.silos})
    parties = {s: Party(s, tmp_path, public, seed, 2**14) for seed, s in enumerate(of.silos)}
    coordinator = Coordinator(of, directory(of.silos))
    takes = {
        "keys": coordinator.take_keys,
        "shares": coordinator.take_shares,
        "train": coordinator.take_masked,
        "consistency": coordinator.take_consistency,
        "unmask": coordinator.take_unmask,
    }
    try:
        for (phase, take), killed in zip(takes.items(), (0, 1, 2, 0, 1), strict=True):
            for place, (silo, request) in enumerate(getattr(coordinator, f"{phase}_requests")().items()):
                if phase in ("train", "consistency", "unmask") and silo == of.silos[3]:
                    continue
                reply = parties[silo].ask(phase, request)
                if place == killed:
                    parties[silo].stop()
                    again = parties[silo].ask(phase, request)
                    assert again.fields == reply.fields
                    assert all(np.array_equal(again.arrays[name], reply.arrays[name]) for name in reply.arrays)
                take(silo, reply)
        other = Message({}, {**of.session, "survivors": list(of.silos)})
        assert "refused" in parties[of.silos[0]].ask("consistency", other).fields
    finally:
        for party in parties.values():
            party.stop()
    expected = sum(np.random.default_rng(seed).integers(0, 2**14, 1000, dtype=np.uint32) for seed in range(3))
    assert np.array_equal(coordinator.finish().values, expected)
    assert {(tmp_path / s).stat().st_mode & 0o777 for s in of.silos} == {0o600}
