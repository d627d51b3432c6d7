"""Whatever arrives, a party answers with a typed refusal or takes it: never with another exception, and unharmed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedlm.errors import FedlmError
from fedlm.privacy.secagg import Message
from fedlm.privacy.secagg.message import digest
from fedlm.privacy.secagg.state import from_bytes, to_bytes
from tests.privacy.secagg.parties import PHASES, Federation, names, parameters

DTYPES = ("<u1", "<u4", "<i8", "<f4", "<f8", "|b1", "<c8", "|S3", "|O", "<M8[s]")


def junk(draw: random.Random, depth: int = 0) -> Any:
    """Any JSON, and some that is none."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: draw.choice([True, False]),
        lambda: draw.choice([0, 1, -1, 2**31, 2**63, -(2**70), 10**5000, 1.0, float("nan"), float("inf")]),
        lambda: draw.choice(
            ["", "silo-00", "silo-01", "\ud800", "\0", "x" * 300, "00" * 32, b"bytes", object(), {1: 2}]
        ),
        lambda: [junk(draw, depth + 1) for _ in range(draw.randrange(4))],
        lambda: [draw.choice(names(5)) for _ in range(draw.randrange(6))],
        lambda: {draw.choice("abc"): junk(draw, depth + 1) for _ in range(draw.randrange(3))},
    ]
    return kinds[draw.randrange(len(kinds) if depth < 3 else 3)]()


def junk_array(draw: random.Random) -> Any:
    shape = tuple(draw.choice([0, 1, 2, 32, 64, 94]) for _ in range(draw.randrange(4)))
    array = np.zeros(shape, np.dtype(draw.choice(DTYPES)))
    if array.dtype.kind in "u" and array.size:
        array[...] = np.frombuffer(draw.randbytes(array.nbytes), array.dtype).reshape(shape)
    return draw.choice([array, array.T, array.tolist(), None, draw.randbytes(8)]) if draw.random() < 0.3 else array


def altered(draw: random.Random, message: Message) -> Any:
    """A message with one to three things changed: a field, an array, some bytes, a part missing or too many."""
    arrays, fields = {n: a.copy() for n, a in message.arrays.items()}, dict(message.fields)
    for _ in range(draw.randrange(1, 4)):
        kind, name = draw.randrange(8), draw.choice([*arrays, "other"])
        field = draw.choice([*fields, "other"])
        if kind == 0:
            fields[field] = junk(draw)
        elif kind == 1:
            arrays[name] = junk_array(draw)
        elif (
            kind == 2
            and isinstance(arrays.get(name), np.ndarray)
            and arrays[name].size
            and arrays[name].dtype == np.uint8
        ):
            flat = arrays[name].reshape(-1)
            flat[draw.randrange(len(flat))] ^= draw.randrange(1, 256)
        elif kind == 3:
            fields.pop(field, None)
        elif kind == 4:
            arrays.pop(name, None)
        elif kind == 5 and isinstance(fields.get(field), list) and fields[field]:
            changed = list(fields[field])
            changed[draw.randrange(len(changed))] = junk(draw)
            fields[field] = draw.choice(
                [changed, changed[::-1], changed + changed, sorted(x for x in changed if isinstance(x, str))]
            )
        elif kind == 6 and isinstance(arrays.get(name), np.ndarray) and arrays[name].ndim:
            arrays[name] = arrays[name][:-1]
        elif kind == 7 and draw.random() < 0.1:
            return draw.choice(
                [None, (), (arrays,), Message(None, fields), Message(arrays, []), Message({1: 2}, fields)]
            )  # type: ignore[arg-type]
    return Message(arrays, fields)


def same(hostile: Any, message: Message) -> bool:
    """Whether the changes have changed nothing."""
    try:
        return digest(hostile) == digest(message)
    except FedlmError:
        return False


@pytest.fixture(scope="module", params=[False, True], ids=["trusted", "malicious"])
def finished(request: pytest.FixtureRequest) -> list[Federation]:
    """Federations that have gone up to each phase; one silo has yet to answer it."""
    of = parameters(5, threshold=4, malicious=request.param)
    phases = [p for p in PHASES if p != "consistency" or of.malicious]
    return [Federation(of, gone={phase: ["silo-01"]}).phases(phase) for phase in phases]


@pytest.mark.parametrize("seed", range(2))
def test_hostile_requests(finished: list[Federation], seed: int) -> None:
    """250 each to a silo that waits for the phase and to one that has answered it; afterwards the honest one counts."""
    draw, refused = random.Random(seed), 0
    for federation in finished:
        phase = list(federation.requests)[-1]
        for silo in ("silo-01", "silo-02"):
            request, before = federation.requests[phase][silo], federation.states.get(silo)
            for _ in range(250 // len(finished)):
                state = from_bytes(before) if before is not None else None
                inputs = (federation.inputs[silo],) if phase == "train" else ()
                try:
                    getattr(federation.silos[silo], phase)(state, altered(draw, request), *inputs)
                except FedlmError:
                    refused += 1
                assert state is None or to_bytes(state) == before
            federation.answer(phase, silo, request)
            if before is not None:
                federation.states[silo] = before
            else:
                del federation.states[silo]
    assert refused > 300


@pytest.mark.parametrize("seed", range(2))
def test_hostile_replies(finished: list[Federation], seed: int) -> None:
    """250 to the coordinator in each of its phases; the sum is right afterwards."""
    draw, refused = random.Random(seed), 0
    of = finished[0].parameters
    federation = Federation(of)
    for phase in [p for p in PHASES if p != "consistency" or of.malicious]:
        federation.gone = {phase: ["silo-01"]}
        federation.phase(phase)
        reply = federation.answer(phase, "silo-01", federation.requests[phase]["silo-01"])
        take = getattr(federation.coordinator, "take_masked" if phase == "train" else f"take_{phase}")
        for _ in range(50):
            hostile = altered(draw, reply)
            if same(hostile, reply):
                continue
            if phase == "train" and isinstance(hostile, Message) and hostile.fields == reply.fields:
                continue  # other bytes of the right length are a vector as good as any
            if phase in ("shares", "unmask") and isinstance(hostile, Message) and hostile.fields == reply.fields:
                continue  # likewise: shares that are found to be wrong later
            try:
                take("silo-01", hostile)
                raise AssertionError("a hostile reply was taken")
            except FedlmError:
                refused += 1
        take("silo-01", reply)
    assert refused > 80
    assert np.array_equal(federation.coordinator.finish().values, sum(federation.inputs.values()))


def test_hostile_states() -> None:
    draw = random.Random(0)
    whole = Federation(parameters(5)).phases("train").states["silo-01"]
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 5)):
            place = draw.randrange(len(data))
            data[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
        try:
            from_bytes(bytes(data))
        except FedlmError:
            refused += 1
    assert refused > 100
