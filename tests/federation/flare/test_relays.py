"""The relays and the engine together: the contract of an engine, and what happens when any part of it fails."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlm.errors import NetworkError, RunError
from fedlm.federation.engines.flare import engine as engine_module
from fedlm.federation.engines.flare import envelope, parts, session, silo_relay
from fedlm.federation.engines.flare.engine import FlareEngine, progress
from fedlm.federation.engines.flare.kit import socket_path
from fedlm.federation.engines.flare.parts import Incoming, TransferError
from fedlm.federation.engines.lines import Lines
from fedlm.messages import Event, Failure, FailureKind, Observe, Reply, Request, Tensors
from fedlm.recipe.schema import Recipe
from tests.federation.conftest import Tiny
from tests.federation.flare.loop import Loop, write_operator

SILOS = ("a", "b", "c")


def double(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:  # noqa: ARG001
    """A silo that sends back twice what it got."""
    observe({"kind": "step", "round": request.round, "step": 0, "steps": 1, "loss": 1.0, "tokens_per_second": 2.0})
    tensors = {name: 2 * tensor for name, tensor in request.tensors.items()}
    return Reply(request.silo, request.verb, request.run, request.round, request.attempt, tensors, {"loss": 0.5})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.FlareEngine, "_introduction", lambda _: {})
    monkeypatch.setattr(session, "HOLD", 0.5)


def recipe(tiny: Tiny, *changes: str) -> Recipe:
    return tiny.recipe("federation.reconnect=5", *changes)


def request(silo: str, tensors: Tensors, verb: str = "train", number: int = 0) -> Request:
    return Request(silo, verb, "run", number, 0, tensors, {"round": number})


def start(loop: Loop, recipe: Recipe, folder: Path, events: list[Event] | None = None) -> FlareEngine:
    return FlareEngine(recipe, loop.kit.path, "run", folder, observe=None if events is None else events.append)


def big(megabytes: int) -> Tensors:
    return {f"layer.{i}": torch.randn(2**18) for i in range(megabytes)}


def exchange(engine: FlareEngine, tensors: Tensors, silos: tuple[str, ...] = SILOS, **more: Any) -> dict[str, Any]:
    answers = list(engine.exchange([request(s, tensors) for s in silos], **more))
    assert sorted(a.silo for a in answers) == sorted(silos)
    return {a.silo: a for a in answers}


def test_tensors_travel_whole_and_in_bounded_parts(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, double))
    events: list[Event] = []
    engine = start(loop, recipe(tiny), tmp_path / "run", events)
    assert list(engine.silos()) == list(SILOS)
    sent = big(10)
    for _ in range(2):
        for answer in exchange(engine, sent).values():
            assert isinstance(answer, Reply), answer
            assert all(torch.equal(answer.tensors[n], 2 * sent[n]) for n in sent)
            assert answer.fields["sent_bytes"] > 10 * 2**20
    assert loop.network.largest < envelope.PART + 4096
    # the second time the silos still had the broadcast
    answer = exchange(engine, sent)["a"]
    assert answer.fields["received_bytes"] < 10_000
    small = exchange(engine, {"x": torch.ones(3, dtype=torch.bfloat16)})["b"]
    assert torch.equal(small.tensors["x"], torch.full((3,), 2.0, dtype=torch.bfloat16))
    assert exchange(engine, {})["c"].fields["loss"] == 0.5
    assert {e["silo"] for e in events} == set(SILOS) and all(e["run"] == "run" for e in events)
    engine.close()
    assert not list((tmp_path / "run/spool").iterdir())
    for kit in loop.kits.values():  # one broadcast may be kept for a repeat; no reply is
        assert not list((kit.run / "spool").glob("reply-*"))


def test_lost_messages_change_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "INLINE", 1024)
    calls: dict[str, int] = {}

    def counting(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        calls[request.silo] = calls.get(request.silo, 0) + 1
        return double(request, observe, should_stop)

    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, counting))
    draw = random.Random(0)
    loop.network.fault = lambda *_: draw.choice([None, None, None, "reply", "request"])
    engine = start(loop, recipe(tiny), tmp_path / "run")
    sent = big(9)
    for answer in exchange(engine, sent).values():
        assert isinstance(answer, Reply), answer
        assert all(torch.equal(answer.tensors[n], 2 * sent[n]) for n in sent)
    assert calls == dict.fromkeys(SILOS, 1)  # asked many times, worked once
    engine.close()


def test_a_silo_out_of_reach_fails_alone_and_comes_back(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, double))
    engine = start(loop, recipe(tiny, "federation.reconnect=0.5"), tmp_path / "run")
    loop.network.off.add("b")
    answers = exchange(engine, big(1))
    assert answers["b"] == Failure("b", FailureKind.UNREACHABLE, "it is not connected")
    assert isinstance(answers["a"], Reply) and isinstance(answers["c"], Reply)
    loop.network.off.clear()
    assert isinstance(exchange(engine, big(1))["b"], Reply)
    engine.close()


def test_a_network_that_heals_in_time_is_not_noticed(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, double))
    engine = start(loop, recipe(tiny), tmp_path / "run")
    loop.network.off.add("b")
    threading.Timer(1.0, loop.network.off.clear).start()
    assert all(isinstance(a, Reply) for a in exchange(engine, big(1)).values())
    engine.close()


class Dying:
    """A worker whose process 'dies' a number of times: its link to the relay closes while it works."""

    def __init__(self, loop: Loop, silo: str, deaths: int) -> None:
        self.loop, self.silo, self.deaths = loop, silo, deaths

    def __call__(self, request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        if self.deaths > 0:
            self.deaths -= 1
            relay = self.loop.network.relays[self.silo]
            assert relay._worker is not None
            relay._worker._socket.shutdown(2)
        return double(request, observe, should_stop)


@pytest.mark.parametrize(("deaths", "ends_well"), [(1, True), (2, False)])
def test_a_worker_that_dies_is_asked_again(tiny: Tiny, tmp_path: Path, deaths: int, ends_well: bool) -> None:
    loop = Loop(tmp_path, ("a",), {})
    loop.start_worker("a", Dying(loop, "a", deaths))
    engine = start(loop, recipe(tiny), tmp_path / "run")
    answer = exchange(engine, big(1), ("a",))["a"]
    if ends_well:
        assert isinstance(answer, Reply)
    else:
        assert answer == Failure("a", FailureKind.UNREACHABLE, "its worker process died each time")
    engine.close()


def test_a_worker_that_never_comes(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {})
    engine = start(loop, recipe(tiny, "federation.reconnect=0.5"), tmp_path / "run")
    answer = exchange(engine, {}, ("a",))["a"]
    assert answer == Failure("a", FailureKind.UNREACHABLE, "its worker process is not running")
    engine.close()


def test_deadline_stops_the_silo_and_drops_its_reply(tiny: Tiny, tmp_path: Path) -> None:
    stopped = threading.Event()

    def slow(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        while request.silo == "b" and not should_stop():
            time.sleep(0.02)
        if request.silo == "b":
            stopped.set()
        return double(request, observe, should_stop)

    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, slow))
    engine = start(loop, recipe(tiny), tmp_path / "run")
    answers = exchange(engine, big(1), deadline=1.0)
    assert answers["b"] == Failure("b", FailureKind.TIMED_OUT, "no reply within the round's deadline")
    assert stopped.wait(5)
    assert isinstance(answers["a"], Reply)
    assert isinstance(next(iter(engine.exchange([request("a", {})]))), Reply)
    engine.close()


def test_the_relay_started_anew_mid_round(tiny: Tiny, tmp_path: Path) -> None:
    """Everything open is asked again under the same identity; no silo works twice."""
    calls: list[str] = []
    go = threading.Event()

    def held(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        calls.append(request.silo)
        go.wait(10)
        return double(request, observe, should_stop)

    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, held))
    engine = start(loop, recipe(tiny), tmp_path / "run")

    def restart() -> None:
        while len(calls) < 3:
            time.sleep(0.02)
        assert loop.relay._session is not None
        loop.relay._listener.close()
        loop.relay._session._lines._socket.shutdown(2)
        loop.start_coordinator()
        time.sleep(0.5)
        go.set()

    threading.Thread(target=restart, daemon=True).start()
    sent = big(5)
    for answer in exchange(engine, sent).values():
        assert isinstance(answer, Reply), answer
        assert all(torch.equal(answer.tensors[n], 2 * sent[n]) for n in sent)
    assert sorted(calls) == list(SILOS)
    engine.close()


def test_a_relay_that_stays_away_ends_the_exchange(tiny: Tiny, tmp_path: Path) -> None:
    def never(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        time.sleep(3)
        return double(request, observe, should_stop)

    loop = Loop(tmp_path, ("a",), {"a": never})
    engine = start(loop, recipe(tiny, "federation.reconnect=0.5"), tmp_path / "run")

    def end() -> None:
        time.sleep(0.5)
        assert loop.relay._session is not None
        loop.relay._listener.close()
        socket_path(loop.kit.path).unlink()
        loop.relay._session._lines._socket.shutdown(2)

    threading.Thread(target=end, daemon=True).start()
    answer = exchange(engine, {}, ("a",))["a"]
    assert answer == Failure(
        "a", FailureKind.UNREACHABLE, "the coordinator's relay does not answer (No such file or directory)"
    )
    engine.close()


def test_a_silo_relay_started_anew_gets_everything_again(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {"a": double})
    engine = start(loop, recipe(tiny), tmp_path / "run")
    puts = 0

    def fault(silo: str, call: str) -> str | None:
        nonlocal puts
        puts += call == "put"
        if puts == 2 and call == "put":
            loop.network.relays["a"]._listener.close()
            kit = loop.kits["a"]
            loop.network.relays["a"] = silo_relay.SiloRelay(
                silo, kit.run / "spool", silo_relay.listen(socket_path(kit.path))
            )
            loop.start_worker("a", double)
            puts += 1
            return "reply"
        return None

    loop.network.fault = fault
    sent = big(9)
    answer = exchange(engine, sent, ("a",))["a"]
    assert isinstance(answer, Reply), answer
    assert all(torch.equal(answer.tensors[n], 2 * sent[n]) for n in sent)
    engine.close()


def test_closing_ends_waiting_exchanges(tiny: Tiny, tmp_path: Path) -> None:
    waiting = threading.Event()

    def never(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        waiting.set()
        while not should_stop():
            time.sleep(0.02)
        return double(request, observe, should_stop)

    loop = Loop(tmp_path, ("a",), {"a": never})
    engine = start(loop, recipe(tiny), tmp_path / "run")
    threading.Thread(target=lambda: (waiting.wait(5), engine.close()), daemon=True).start()
    assert exchange(engine, {}, ("a",))["a"] == Failure("a", FailureKind.UNREACHABLE, "the engine was closed")
    assert exchange(engine, {}, ("a",))["a"] == Failure("a", FailureKind.UNREACHABLE, "the engine was closed")


def test_a_bounded_number_of_updates_is_fetched_ahead(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silos = tuple("abcdefgh")
    monkeypatch.setattr(session, "INLINE", 0)
    loop = Loop(tmp_path, silos, dict.fromkeys(silos, double))
    engine = start(loop, recipe(tiny), tmp_path / "run")
    answers = engine.exchange([request(s, big(1)) for s in silos])
    next(answers)
    time.sleep(1.5)
    assert len(list((tmp_path / "run/spool").glob("reply-*"))) <= session.WINDOW
    assert len(list(answers)) == len(silos) - 1
    engine.close()


def test_one_run_at_a_time(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {"a": double})
    engine = start(loop, recipe(tiny), tmp_path / "run")
    with pytest.raises(NetworkError, match=r"in use by the run run of ops@example\.org"):
        start(loop, recipe(tiny), tmp_path / "other")
    assert isinstance(exchange(engine, {}, ("a",))["a"], Reply)
    engine.close()
    until = time.monotonic() + 5
    while loop.relay._session is not None and time.monotonic() < until:
        time.sleep(0.02)
    start(loop, recipe(tiny), tmp_path / "other").close()


def test_only_leads_may_run(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {"a": double})
    write_operator(loop.kit.operator, loop.root, role="member")
    with pytest.raises(NetworkError, match="may not run federations: its role is 'member'"):
        start(loop, recipe(tiny), tmp_path / "run")


def test_a_stolen_certificate_is_not_enough(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {"a": double})
    stolen = (loop.kit.operator / "client.crt").read_bytes()
    write_operator(loop.kit.operator, loop.root)
    (loop.kit.operator / "client.crt").write_bytes(stolen)
    with pytest.raises(NetworkError, match="signature"):
        start(loop, recipe(tiny), tmp_path / "run")


def visit(loop: Loop, message: dict[str, Any], kit: Path | None = None) -> dict[str, Any]:
    import socket

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(str(socket_path(kit or loop.kit.path)))
    lines = Lines(connection)
    lines.send(message)
    answer = lines.receive(timeout=10)
    lines.close()
    assert answer is not None
    return answer


def test_status_and_revocation(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a", "b"), {"a": double})
    engine = start(loop, recipe(tiny), tmp_path / "run")
    exchange(engine, {}, ("a",))
    loop.network.off.add("b")
    status = visit(loop, {"type": "status"})
    assert status["run"]["run"] == "run" and status["network"] == "loop"
    assert status["silos"]["a"]["connected"] and status["silos"]["a"]["worker"]
    assert abs(status["silos"]["a"]["clock_skew"]) < 5 and status["silos"]["a"]["free_memory"] > 0
    assert not status["silos"]["b"]["connected"] and not status["silos"]["b"]["worker"]
    engine.close()
    assert visit(loop, {"type": "status"}, loop.kits["a"].path)["name"] == "a"
    assert visit(loop, {"type": "revoke", "silo": "a"}) == {"type": "ok"}
    assert visit(loop, {"type": "status"})["silos"]["a"]["revoked"]
    assert "no silo 'x'" in visit(loop, {"type": "revoke", "silo": "x"})["reason"]
    time.sleep(0.2)
    engine = start(loop, recipe(tiny), tmp_path / "run")
    assert list(engine.silos()) == ["b"]
    engine.close()


def test_what_the_socket_files_allow(tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {})
    for kit in (loop.kit, loop.kits["a"]):
        assert socket_path(kit.path).stat().st_mode & 0o077 == 0


# -------------------------------------------------------------------- hostile silos and coordinators


def test_messages_are_bounded_and_plain() -> None:
    assert envelope.unpack(envelope.pack({"op": "x"}, b"body"))[0] == {"op": "x", "protocol": envelope.PROTOCOL}
    for bad in (
        b"",
        b"\0\0\0",
        struct.pack(">I", 2**31) + b"{}",
        struct.pack(">I", 2) + b"[]",
        struct.pack(">I", 1) + b"{",
        struct.pack(">I", 2) + b"{}" + bytes(envelope.PART + 1),
        b"\x80\x04\x95" + bytes(50),  # a pickle
        struct.pack(">I", 200_000) + b"[" * 200_000,
    ):
        with pytest.raises(envelope.BadMessageError):
            envelope.unpack(bad)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"op": "no such call"},
        {"op": "ask"},
        {"op": "ask", "id": "1", "request": [], "tensors": None, "retries": 0, "patience": 1},
        {"op": "ask", "id": "1", "request": {"silo": "z"}, "tensors": None, "retries": 0, "patience": 1},
        {
            "op": "ask",
            "id": "1",
            "request": {"silo": "a"},
            "tensors": {"sha256": "../x", "size": 5},
            "retries": 0,
            "patience": 1,
        },
        {
            "op": "ask",
            "id": "1",
            "request": {"silo": "a"},
            "tensors": {"sha256": "0" * 64, "size": 2**62},
            "retries": 0,
            "patience": 1,
        },
        {
            "op": "ask",
            "id": "1",
            "request": {"silo": "a"},
            "tensors": {"sha256": "0" * 64, "size": -1},
            "retries": 0,
            "patience": 1,
        },
        {"op": "put", "id": "nobody", "offset": 0},
        {"op": "wait", "id": "nobody", "told": 0, "seconds": 1e9},
        {"op": "get", "id": "nobody", "offset": -1},
        {"op": "drop", "id": ["x"]},
    ],
)
def test_a_hostile_coordinator_breaks_nothing(tmp_path: Path, header: dict[str, Any]) -> None:
    relay = silo_relay.SiloRelay("a", tmp_path / "spool", silo_relay.listen(tmp_path / "s"))
    answer, _ = envelope.unpack(relay.handle(envelope.pack(header, b"x" * 100)))
    assert "error" in answer or answer["state"] in ("unknown", "dropped", "done")
    if answer.get("state") == "done":
        assert answer["answer"]["type"] == "failure"
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert envelope.unpack(relay.handle(envelope.pack({"op": "status"})))[0]["name"] == "a"


class Liar:
    """A silo's relay that answers `wait` with what it likes."""

    def __init__(self, answer: dict[str, Any], body: bytes = b"") -> None:
        self.answer, self.body = answer, body

    def handle(self, message: bytes) -> bytes:
        header, _ = envelope.unpack(message)
        if header["op"] in ("wait", "get"):
            return envelope.pack(self.answer, self.body)
        return envelope.pack({"state": "running"})


NO_FILE = b"this is no safetensors file" * 10
GOOD = {"type": "reply", "fields": {}}


@pytest.mark.parametrize(
    ("answer", "body", "kind"),
    [
        ({"state": "done"}, b"", FailureKind.ERROR),
        ({"state": "strange"}, b"", FailureKind.ERROR),
        (
            {
                "state": "done",
                "answer": {"type": "failure", "kind": "made up", "reason": "x"},
                "size": 0,
                "events": [],
                "told": 0,
            },
            b"",
            FailureKind.ERROR,
        ),
        (
            {"state": "done", "answer": GOOD, "size": 2**62, "sha256": "0" * 64, "events": [], "told": 0},
            b"x",
            FailureKind.ERROR,
        ),
        (
            {"state": "done", "answer": GOOD, "size": 5, "sha256": "../../etc", "events": [], "told": 0},
            b"x",
            FailureKind.ERROR,
        ),
        (
            {"state": "done", "answer": GOOD, "size": 5, "sha256": "0" * 64, "events": [], "told": 0},
            b"wrong",
            FailureKind.ERROR,
        ),
        (
            {"state": "done", "answer": GOOD, "size": 5, "sha256": "0" * 64, "events": [], "told": 0},
            b"",
            FailureKind.ERROR,
        ),
        (
            {
                "state": "done",
                "answer": GOOD,
                "size": len(NO_FILE),
                "sha256": hashlib.sha256(NO_FILE).hexdigest(),
                "events": [{"kind": "step"}, {"kind": "step", "loss": "text"}, 5, {"kind": "anything"}],
                "told": 4,
            },
            NO_FILE,
            FailureKind.BAD_UPDATE,
        ),
    ],
)
def test_a_lying_silo_fails_alone(
    tiny: Tiny, tmp_path: Path, answer: dict[str, Any], body: bytes, kind: FailureKind
) -> None:
    loop = Loop(tmp_path, ("a", "b"), {"a": double})
    loop.network.relays["b"] = Liar(answer, body)  # type: ignore[assignment]
    events: list[Event] = []
    engine = start(loop, recipe(tiny), tmp_path / "run", events)
    answers = exchange(engine, big(1), ("a", "b"))
    assert isinstance(answers["a"], Reply)
    assert isinstance(answers["b"], Failure) and answers["b"].kind is kind
    assert all(e["silo"] == "a" for e in events)
    assert isinstance(exchange(engine, big(1), ("a", "b"))["a"], Reply)
    assert not list((tmp_path / "run/spool").glob("reply-*"))
    engine.close()


def test_relays_of_other_versions_refuse_each_other(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path, ("a", "b"), {"a": double, "b": double})

    class Newer:
        def __init__(self, relay: silo_relay.SiloRelay) -> None:
            self.relay = relay

        def handle(self, message: bytes) -> bytes:
            with monkeypatch.context() as patch:
                patch.setattr(envelope, "PROTOCOL", 2)
                patch.setattr(silo_relay, "PROTOCOL", 2)
                patch.setattr("fedlm.__version__", "9.9.9")
                return self.relay.handle(message)

    loop.network.relays["b"] = Newer(loop.network.relays["b"])  # type: ignore[assignment]
    engine = start(loop, recipe(tiny), tmp_path / "run")
    answers = exchange(engine, {}, ("b",))
    assert isinstance(answers["b"], Failure) and answers["b"].kind is FailureKind.VERSION_MISMATCH
    assert "fedlm 9.9.9 (protocol 2), the coordinator's of 0.1.0 (protocol 1)" in answers["b"].reason
    assert isinstance(exchange(engine, {}, ("a",))["a"], Reply)
    engine.close()


def test_nothing_is_unpickled(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    loop = Loop(tmp_path, SILOS, dict.fromkeys(SILOS, double))
    engine = start(loop, recipe(tiny), tmp_path / "run")
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, never)
    assert all(isinstance(answer, Reply) for answer in exchange(engine, big(5)).values())
    engine.close()


def test_progress_of_silos_is_checked() -> None:
    good = {"kind": "step", "round": 0, "step": 1, "steps": 2, "loss": 1.5, "tokens_per_second": 9.0}
    assert progress({**good, "text": "private", "silo": "other"}) == good
    for bad in (
        {**good, "loss": float("nan")},
        {**good, "loss": "x"},
        {"kind": "step"},
        {"kind": "run_done"},
        None,
        "x",
    ):
        assert progress(bad) is None


def test_a_full_disk_at_the_coordinator_is_no_fault_of_the_silos(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def update(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:
        answer = double(request, observe, should_stop)
        assert isinstance(answer, Reply)
        return replace(answer, tensors={"x": torch.ones(3)})

    loop = Loop(tmp_path, ("a",), {"a": update})
    engine = start(loop, recipe(tiny), tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(parts, "SPARE_DISK", 2**60)  # nothing is sent, so only the coordinator needs room
        with pytest.raises(RunError, match=r"an update of a cannot be received: the disk is full: .* make room"):
            exchange(engine, {}, ("a",))
    engine.close()


def test_a_file_goes_on_from_where_it_broke(tmp_path: Path) -> None:
    content = bytes(range(256)) * 100
    digest = hashlib.sha256(content).hexdigest()
    incoming = Incoming(tmp_path, digest, len(content))
    assert incoming.add(0, content[:1000]) == 1000
    assert incoming.add(0, content[:1000]) == 1000  # a repeat
    assert incoming.add(5000, content[5000:6000]) == 1000  # from the future
    assert incoming.add(1000, content[1000:]) == len(content) and incoming.complete
    assert incoming.path.read_bytes() == content
    assert Incoming(tmp_path, digest, len(content)).complete
    with pytest.raises(TransferError, match="disk is full"):
        Incoming(tmp_path, "1" * 64, 2**60)
    with pytest.raises(TransferError, match="SHA-256"):
        Incoming(tmp_path, "1" * 64, 4).add(0, b"abcd")
    with pytest.raises(TransferError, match="more bytes"):
        Incoming(tmp_path, "2" * 64, 4).add(0, b"abcde")
    assert [p.name for p in tmp_path.iterdir()] == [f"{digest}.safetensors"]


def test_relays_import_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, fedlm.federation.engines.flare.coordinator_relay, fedlm.federation.engines.flare.silo_relay;"
        "print([m for m in ('torch', 'pickle5', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
