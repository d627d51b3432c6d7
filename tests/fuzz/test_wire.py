"""What comes over the wire, decoder by decoder. Of each: which exception is its refusal, and what it means that a
message is accepted. Anything else is a fault: another exception, more than five seconds of processor time, or a message
that no honest party writes. What was found so is in `test_found`."""

from __future__ import annotations

import hashlib
import json
import math
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlm.errors import DataError, RecipeError, UpdateRefused
from fedlm.federation.engines.flare.asked import MAX_REQUEST, checked
from fedlm.federation.engines.flare.coordinator_relay import _shown
from fedlm.federation.engines.flare.engine import progress
from fedlm.federation.engines.flare.envelope import MAX_HEADER, PART, PROTOCOL, BadMessageError, pack, unpack
from fedlm.federation.engines.flare.parts import Incoming, TransferError
from fedlm.federation.engines.flare.session import LONGEST_REASON, _checked
from fedlm.federation.engines.flare.silo_relay import SiloRelay, listen
from fedlm.federation.engines.lazy import DTYPES, FileTensors, checked_tensors, parts_of
from fedlm.federation.engines.lines import ClosedError, Lines, spooled
from fedlm.federation.engines.wire import parse_reply, parse_request, serialized_size, write_spool
from fedlm.federation.figures import LARGEST, check_card, check_counts, check_training
from fedlm.federation.silo.answered import read_queries
from fedlm.federation.silo.pairs import PairTables
from fedlm.federation.silo.pairs import checked as checked_lines
from fedlm.federation.silo.received import Received, UnsyncedError
from fedlm.federation.silo.refusals import Forbidden
from fedlm.federation.silo.scored import read_candidates
from fedlm.federation.silo.text import pack_text, unpack_text
from fedlm.federation.updates import check_update
from fedlm.federation.versions import HELD, MOVED, PLAN, VERBS, WHOLE, content_hash, digest
from fedlm.messages import Failure, Reply, Request
from fedlm.recipe.capacity import parse_capacity
from fedlm.recipe.schema import Recipe
from fedlm.training.plan import parse_plan
from tests.fuzz.hostile import ALL, FAST, changed, damaged, leaves, messages, tried, written
from tests.guards.test_guards import KEY, LOSSY, chain, shapes_of, update
from tests.guards.test_hostile import hostile

each = pytest.mark.parametrize("count", [FAST, pytest.param(ALL, marks=pytest.mark.slow)])
"""Some messages in the fast suite, ten times as many in the slow one."""

REQUEST = {"silo": "a", "verb": "train", "run": "r", "round": 0, "attempt": 0, "fields": {"accepted": -1}}
ASK = {"op": "ask", "id": "1", "request": REQUEST, "retries": 1, "patience": 1.0}
CALLS = [
    {**ASK, "tensors": None},
    {**ASK, "id": "2", "tensors": {"sha256": hashlib.sha256(b"x" * 9).hexdigest(), "size": 9}},
    {"op": "put", "id": "2", "offset": 0},
    {"op": "wait", "id": "1", "told": 0, "seconds": 0.0},
    {"op": "get", "id": "1", "offset": 0},
    *({"op": op, "id": "1"} for op in ("drop", "cancel", "status")),
]


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {"name": "r", "model": {"source": "smollm2-135m-instruct"}, "data": {"at_silos": True}}
    return Recipe.model_validate({**data, "training": {"steps": 4, "max_length": 64}, **changes})


# ------------------------------------------------------------------------------------------------ framing


@each
def test_envelopes(count: int) -> None:
    """Refused: BadMessageError. Accepted: a JSON object and a body, each within its bound, that make up the message."""
    honest = pack({"op": "ask", "id": "1"}, b"body")

    @messages(count)
    @given(st.one_of(damaged(honest), changed({"op": "x"}).map(lambda v: _framed(written(v))), st.binary(max_size=40)))
    def decode(message: bytes) -> None:
        fine, found = tried(lambda: unpack(message), (BadMessageError,))
        if fine:
            header, body = found
            (length,) = struct.unpack(">I", message[:4])
            assert isinstance(header, dict) and length <= MAX_HEADER and len(body) <= PART
            assert message == message[: 4 + length] + bytes(body)

    decode()


def _framed(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


@each
def test_lines(count: int) -> None:
    """Refused: ClosedError, the link ends. Accepted: JSON objects."""

    @messages(count)
    @given(st.one_of(damaged(b'{"type": "event", "job": 1}\n'), changed({"a": [1]}).map(lambda v: written(v) + b"\n")))
    def decode(data: bytes) -> None:
        left, right = socket.socketpair()
        left.sendall(data[:60_000])
        left.close()
        lines, heard = Lines(right), []
        fine, _ = tried(lambda: [heard.append(lines.receive(1.0)) for _ in range(20)], (ClosedError,))
        lines.close()
        assert not fine and all(isinstance(message, dict) for message in heard)

    decode()


@each
def test_a_silos_relay_answers_whatever_comes(count: int, tmp_path: Path) -> None:
    """Refused: an answer that says so. Accepted: a request of bounded size, under a name of bounded length; files of
    tensors lie in the spool, under their own hash."""
    relay = SiloRelay("a", tmp_path / "spool", listen(tmp_path / "s"))
    before = set(tmp_path.rglob("*"))

    @messages(count)
    @given(st.sampled_from(CALLS).flatmap(changed), st.sampled_from((b"", b"x" * 9, b"y" * 9)))
    def decode(header: Any, body: bytes) -> None:
        packed = {"protocol": PROTOCOL, **header} if isinstance(header, dict) else header
        if isinstance(packed, dict) and isinstance(packed.get("seconds"), float | int):
            packed["seconds"] = min(packed["seconds"], 0.0)  # a held answer is not a hang
        message = _framed(written(packed)) + body
        fine, answer = tried(lambda: relay.handle(message), ())
        assert fine and isinstance(unpack(answer)[0], dict)

    decode()
    assert all(len(name) <= 300 for name in relay._asked) and len(relay._asked) <= 256
    for asked in relay._asked.values():
        assert len(json.dumps(asked.message)) < 2 * MAX_REQUEST
    made = set(tmp_path.rglob("*")) - before
    assert all(path.parent == tmp_path / "spool" and len(path.stem) == 64 for path in made)
    relay._listener.close()


@each
def test_requests_on_their_way_to_a_worker(count: int) -> None:
    """Refused: KeyError, TypeError, ValueError, RecursionError, which the relay answers. Accepted: three short words,
    two numbers below 2^31, and an object, all of which the worker's parser takes."""

    @messages(count)
    @given(changed(REQUEST))
    def decode(value: Any) -> None:
        fine, found = tried(lambda: checked(value), (KeyError, TypeError, ValueError, RecursionError))
        if fine:
            assert all(len(found[name]) <= 300 for name in ("silo", "verb", "run"))
            request = parse_request(found, {})
            assert abs(request.round) < 2**31 and isinstance(request.fields, dict)

    decode()


@each
def test_files_on_their_way(count: int, tmp_path: Path) -> None:
    """Refused: TransferError. Accepted: the bytes whose hash was announced, under that hash."""
    content = bytes(range(200))
    digest_ = hashlib.sha256(content).hexdigest()
    announced = st.tuples(st.sampled_from((digest_, "0" * 64, "../x", digest_.upper(), digest_ + "\n")), leaves)
    parts = st.lists(st.tuples(st.integers(-3, 210), st.integers(0, 210), st.integers(0, 3)), max_size=5)

    @messages(count)
    @given(st.one_of(st.tuples(st.just(digest_), st.just(200)), announced), parts)
    def decode(about: tuple[str, Any], moves: list[tuple[int, int, int]]) -> None:
        name, size = about

        def take() -> Incoming:
            found = Incoming(tmp_path, name, int(size))
            for start, stop, noise in [*moves, (0, 100, 0), (100, 200, 0)]:
                found.add(start, content[max(start, 0) : stop] if noise < 3 else b"z" * 7)
            return found

        fine, found = tried(take, (TransferError, ValueError, TypeError, OverflowError))
        if fine and found.complete:
            assert name == digest_ and found.path.read_bytes() == content
        for path in tmp_path.iterdir():
            assert path.name.startswith(digest_) or path.name.startswith("0" * 64)
            path.unlink()

    decode()


# ------------------------------------------------------------------------------------------------ tensors

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0, 3)}


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = written(header)
    return struct.pack("<Q", (len(text) if length is None else length) % 2**64) + text + body


@each
def test_files_of_tensors(count: int, tmp_path: Path) -> None:
    """Refused: ValueError. Accepted: what an honest writer leaves, namely known types, names of up to 1,000 characters
    without control characters, tensors end to end that fill the file. Read lazily and at once they are the same."""
    write_spool(tmp_path / "honest", TENSORS)
    header, body = header_of(tmp_path / "honest")
    lies = st.tuples(changed(header), st.just(body) | st.just(b""), st.none() | st.sampled_from((0, 2**63, 10**8)))

    @messages(count)
    @given(st.one_of(damaged((tmp_path / "honest").read_bytes()), lies.map(lambda lie: file_of(*lie))))
    def decode(data: bytes) -> None:
        path = tmp_path / "file"
        path.write_bytes(data)
        fine, parts = tried(lambda: parts_of(path), (ValueError,))
        again, whole = tried(lambda: checked_tensors(path), (ValueError,))
        assert fine == again
        if fine:
            lazy = FileTensors(path)
            assert lazy.keys() == whole.keys() == parts.keys()
            for name, tensor in whole.items():
                assert tensor.dtype in DTYPES.values() and len(name) <= 1000 and name.isprintable()
                assert tensor.shape == lazy[name].shape and tensor.dtype == lazy[name].dtype
                assert content_hash(tensor) == content_hash(lazy[name])
            (length,) = struct.unpack("<Q", data[:8])
            assert sum(tensor.nbytes for tensor in whole.values()) == len(data) - 8 - length
            if whole and "__metadata__" not in json.loads(data[8 : 8 + length]):
                assert serialized_size(whole) <= len(data) + 8 + 64 * len(whole)

    decode()


@pytest.mark.parametrize("specs", LOSSY, ids=str)
@pytest.mark.parametrize("count", [4, pytest.param(ALL // 10, marks=pytest.mark.slow)])
def test_payloads_of_guards(specs: list[dict[str, Any]], count: int) -> None:
    """Refused: UpdateRefused. Accepted: parts of exactly the types and lengths that follow from the update's shapes,
    which stand for finite numbers. (A code or a padding bit that no encoder writes decodes to a number like others.)"""
    made, shapes = chain(*specs), shapes_of(update())

    @messages(count)
    @given(hostile(made.encode(update(), KEY)))
    def decode(payload: Any) -> None:
        fine, back = tried(lambda: made.decode(payload, shapes, KEY), (UpdateRefused,))
        if fine:
            assert shapes_of(back) == dict(sorted(shapes.items()))
            assert all(bool(torch.isfinite(tensor).all()) for tensor in back.values())

    decode()


@st.composite
def hostile_tensors(draw: st.DrawFn, honest: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as a file of them may hold: some are missing, extra, of another type, shape or content."""
    found = dict(honest)
    kinds = st.sampled_from(("dtype", "shape", "value", "remove", "extra", "empty", "content"))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(honest)))
        tensor = found.get(name, honest[name])
        match draw(kinds):
            case "dtype":
                tensor = tensor.to(draw(st.sampled_from(sorted(DTYPES.values(), key=str))))
            case "shape":
                shapes = (tensor[None], tensor.reshape(-1), tensor[..., :1].contiguous())
                tensor = draw(st.sampled_from(shapes)) if tensor.ndim else tensor[None]
            case "value" if tensor.is_floating_point():
                value = draw(st.sampled_from((math.nan, math.inf, 3e38, 0.0, -1e30)))
                tensor = torch.full(tensor.shape, value, dtype=torch.float64).to(tensor.dtype)
            case "value":
                tensor = torch.full_like(tensor, draw(st.sampled_from((-1, 0, 1, 127))))
            case "content":
                raw = draw(st.binary(min_size=tensor.nbytes, max_size=tensor.nbytes))
                if raw and tensor.dtype is not torch.bool:
                    tensor = torch.frombuffer(bytearray(raw), dtype=tensor.dtype).reshape(tensor.shape)
            case "extra":
                found[draw(st.sampled_from(("", "../x", "downlink/plan", "a" * 900, "0.peak")))] = tensor
            case "empty":
                tensor = torch.zeros(0, dtype=tensor.dtype)
            case "remove":
                found.pop(name, None)
                continue
        found[name] = tensor
    return found


@each
def test_updates(count: int) -> None:
    """Refused: UpdateRefused. Accepted: exactly the expected names and shapes, floating point, finite, and small enough
    that a million such updates can be added up; a positive, finite weight below the bound."""
    honest = {"x": torch.ones(2, 3), "y": torch.ones(4)}
    shapes = {name: tensor.shape for name, tensor in honest.items()}

    @messages(count)
    @given(st.just(honest) | hostile_tensors(honest), st.sampled_from((1.0, 0.0, -1.0, 9.0, 1e308, math.nan, math.inf)))
    def decode(tensors: Any, weight: float) -> None:
        fine, _ = tried(lambda: check_update("s", tensors, shapes, weight, max_weight=10.0), (UpdateRefused,))
        if fine:
            assert tensors.keys() == honest.keys() and 0 < weight <= 10
            assert all(tensors[n].shape == shapes[n] and tensors[n].is_floating_point() for n in honest)
            assert all(bool(torch.isfinite(t.float() * weight * 1e6).all()) for t in tensors.values())

    decode()


@each
def test_what_a_silo_builds_on_what_it_holds(count: int, tmp_path: Path) -> None:
    """Refused: UnsyncedError, nothing is stored. Accepted: a message whose whole content has its digest."""
    honest = {"a": torch.ones(3), "b": torch.zeros(2)}
    whole = digest({name: content_hash(tensor) for name, tensor in honest.items()})
    received = Received(tmp_path / "s", None, 0)
    received.complete(Request("s", "train", "run", 0, 0, honest, {WHOLE: whole}))
    plan = bytes([HELD["train"], HELD["train"]])
    message = {PLAN: torch.frombuffer(bytearray(plan), dtype=torch.uint8), "a": honest["a"]}
    codes = st.lists(st.sampled_from((0, *HELD.values(), *MOVED.values(), 9)), max_size=3).map(bytes)
    fields = {WHOLE: whole, "listed": "train", "stepped": 0}

    @messages(count)
    @given(hostile_tensors(message), st.none() | codes, changed(fields), st.sampled_from((*VERBS, "hello")))
    def decode(tensors: dict[str, torch.Tensor], other: bytes | None, said: Any, verb: str) -> None:
        if other:
            tensors[PLAN] = torch.frombuffer(bytearray(other), dtype=torch.uint8)
        request = Request("s", verb, "run", 0, 0, tensors, said if isinstance(said, dict) else {})
        fine, found = tried(lambda: received.complete(request), (UnsyncedError,))
        if fine and request.fields.get(WHOLE) is not None:
            assert request.fields[WHOLE] == digest({n: content_hash(t) for n, t in found.tensors.items()})

    decode()


@each
def test_text_in_tensors(count: int) -> None:
    """Refused: DataError. Accepted: JSON of bounded size; prompts and questions within their own bounds."""
    prompts, queries = ["a", ""], {"queries": [["q", ["a", "b"]]], "answers": [0]}

    @messages(count)
    @given(changed(prompts) | changed(queries), st.none() | st.binary(max_size=50))
    def decode(value: Any, raw: bytes | None) -> None:
        data = json.dumps(value).encode() if raw is None else raw
        tensors = {"text": torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8)}
        tried(lambda: unpack_text(tensors, 10_000), (DataError,))
        fine, found = tried(lambda: read_candidates(tensors), (DataError,))
        assert not fine or all(isinstance(text, str) for text in found)
        fine, found = tried(lambda: read_queries(tensors), (DataError,))
        if fine:
            asked, agreed = found
            assert len(agreed) in (0, len(asked)) and all(len(choices) >= 2 for _, choices in asked)

    assert unpack_text(pack_text(prompts), 100) == prompts
    decode()


@each
def test_requests_for_pairs(count: int) -> None:
    """Refused: DataError. Accepted: merges of symbols that there are, none of more than 1,024 letters, and lines that
    there are, each once."""
    i32 = torch.int32
    honest = {"merges": torch.tensor([[97, 98]], dtype=i32), "rows": torch.tensor([1, 256], dtype=i32)}
    honest["columns"] = torch.tensor([0], dtype=i32)
    rows = [{"text": "abab ab the cat"}]
    doubling = [[256 + i, 256 + i] for i in range(60)]
    bombs = st.integers(1, 60).map(lambda n: {**honest, "merges": torch.tensor([[97, 98], *doubling[:n]], dtype=i32)})

    @messages(count)
    @given(hostile_tensors(honest) | bombs)
    def decode(tensors: dict[str, torch.Tensor]) -> None:
        tried(lambda: checked_lines(tensors), (DataError,))
        tables = PairTables()
        fine, found = tried(lambda: tables.answer("s", rows, "text", tensors), (DataError,))
        if fine:
            known = len(tables._held["s"].known)
            assert max(map(len, tables._held["s"].known.strings)) <= 1024
            for name in ("rows", "columns"):
                assert found[name].shape == (len(tensors[name]), known) and int(found[name].sum()) >= 0

    decode()


# ------------------------------------------------------------------------------------------------ words of silos

TRAINED = {
    "loss": 1.5,
    "examples": 4,
    "tokens": 9,
    "target_tokens": 7,
    "loss_count": 7,
    "steps": 2,
    "seconds": 0.1,
    "tokens_per_second": 90.0,
    "peak_rss": 1000,
    "dropped": 0,
    "cut": 0,
    "figures": {"loss": [3.0, 7]},
}
MEASURED = {"examples": 4, "loss_sum": 3.0, "loss_tokens": 9, "seconds": 0.1, "peak_rss": 10, "figures": {}}
CARD = {"card": {"rows": {"train": 4, "validation": 1, "test": 0}, "labels": {"a": 4}}, "versions": {"fedlm": "0"}}
PLAN_FIELDS = {"rank": 4, "first_layer": 1, "targets": ["q_proj"], "steps": 2, "seconds": 1.5, "dtype": "float32"}


@each
def test_figures_of_silos(count: int) -> None:
    """Refused: UpdateRefused. Accepted: finite numbers below 2^53 that can be written down; counts within the rows."""
    made = recipe()
    for honest, check in (
        (TRAINED, lambda reply: check_training(reply, made)),
        (MEASURED, lambda reply: check_counts(reply, made, 4)),
    ):
        check(Reply("s", "x", "r", 0, fields=honest))  # type: ignore[operator]

    @messages(count)
    @given(changed(TRAINED), changed(MEASURED), changed(CARD))
    def decode(trained: Any, measured: Any, card: Any) -> None:
        reply = Reply("s", "train", "r", 0, fields=trained if isinstance(trained, dict) else {})
        fine, refusal = tried(lambda: check_training(reply, made), (UpdateRefused,))
        assert fine or len(refusal.what) < 300
        if fine:
            json.dumps({n: reply.fields[n] for n in TRAINED}, allow_nan=False)
            assert all(abs(reply.fields[n]) < LARGEST for n in TRAINED if n != "figures")
        reply = Reply("s", "evaluate", "r", 0, fields=measured if isinstance(measured, dict) else {})
        if tried(lambda: check_counts(reply, made, 4), (UpdateRefused,))[0]:
            json.dumps({n: reply.fields[n] for n in ("examples", "loss_sum", "loss_tokens")}, allow_nan=False)
            assert 0 <= reply.fields["examples"] <= 4
        said = card if isinstance(card, dict) else {}
        fine, found = tried(lambda: check_card("s", said), (UpdateRefused,))
        if fine:
            assert all(0 <= found["rows"][role] < LARGEST for role in ("train", "validation", "test"))

    decode()


@each
def test_plans_capacities_and_events(count: int) -> None:
    """Refused: UpdateRefused, RecipeError, None. Accepted: known fields with numbers within bounds."""
    made = recipe(federation={"algorithm": {"name": "hetlora"}}, adapter={"rank": 8})

    @messages(count)
    @given(
        changed(PLAN_FIELDS),
        changed({"memory": "1.5GB", "seconds": 3.0, "rank": 4, "dtype": "float32"}),
        changed({"kind": "step", "round": 0, "step": 0, "steps": 1, "loss": 1.0, "tokens_per_second": 2.0}),
    )
    def decode(plan: Any, capacity: Any, event: Any) -> None:
        fine, found = tried(lambda: parse_plan(plan, made), (UpdateRefused,))
        assert not fine or 0 < found.rank <= 8
        fine, found = tried(lambda: parse_capacity(capacity), (RecipeError,))
        assert not fine or json.dumps(found.given, allow_nan=False)
        fine, found = tried(lambda: progress(event), ())
        assert fine and (found is None or json.dumps(found, allow_nan=False))

    decode()


@each
def test_answers_of_silos(count: int) -> None:
    """Refused: BadMessageError and what the carrier catches beside it. Accepted: a reply's fields, or a known kind of
    failure with a short, printable reason."""
    honest = [{"type": "reply", "fields": {"a": 1}}, {"type": "failure", "kind": "refused", "reason": "no"}]
    caught = (BadMessageError, KeyError, TypeError, ValueError, RecursionError)

    @messages(count)
    @given(st.sampled_from(honest).flatmap(changed))
    def decode(answer: Any) -> None:
        fine, found = tried(lambda: _checked(answer), caught)
        if fine and found["type"] == "failure":
            assert len(found["reason"]) <= LONGEST_REASON and (found["reason"] + "x").isprintable()
        fine, found = tried(lambda: parse_reply(answer, Request("s", "train", "r", 0), {}), caught)
        if fine:
            assert found.silo == "s" and isinstance(found, Failure | Reply)
        fine, found = tried(lambda: _shown(answer), ())
        assert fine and "\x1b" not in str(found)

    decode()


@each
def test_recipes_from_a_coordinator(count: int) -> None:
    """Refused: Forbidden. Accepted: a recipe that can be written down and read again as the same."""
    from fedlm.federation.silo.own import parse_recipe

    honest = json.loads(json.dumps(recipe(guards=[{"name": "int8"}]).model_dump(mode="json")))

    @messages(count)
    @given(changed(honest))
    def decode(value: Any) -> None:
        fine, found = tried(lambda: parse_recipe(value), (Forbidden,))
        if fine:
            assert parse_recipe(json.loads(json.dumps(found.model_dump(mode="json"), allow_nan=False))) == found
        else:
            assert len(str(found)) < 1200

    decode()


@each
def test_names_of_files(count: int, tmp_path: Path) -> None:
    """Refused: ValueError. Accepted: a bare name in the folder."""

    @messages(count)
    @given(st.text(max_size=20) | st.sampled_from(("../x", "/x", "x/../y", "..", ".", "a\0", "~root", "x" * 300)))
    def decode(name: str) -> None:
        fine, found = tried(lambda: spooled(tmp_path, name), (ValueError,))
        assert not fine or (found.parent == tmp_path and found.name == name and "\0" not in name)

    decode()
