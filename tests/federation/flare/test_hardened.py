"""What goes wrong only after days, at the worst moment, or by somebody's intent: each of these went wrong once."""

from __future__ import annotations

import hashlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from fedlm.cli.network import _table
from fedlm.errors import UpdateRefused
from fedlm.federation.engines.flare import engine as engine_module
from fedlm.federation.engines.flare import envelope, session, silo_relay
from fedlm.federation.engines.flare.asked import MAX_EVENTS
from fedlm.federation.engines.flare.engine import FlareEngine, progress
from fedlm.federation.engines.flare.kit import socket_path
from fedlm.federation.engines.flare.worker import serve
from fedlm.federation.engines.lazy import FileTensors
from fedlm.federation.engines.lines import Lines
from fedlm.federation.figures import check_card
from fedlm.messages import Event, Failure, FailureKind, Observe, Reply, Request
from tests.federation.conftest import Tiny
from tests.federation.flare.loop import Loop
from tests.federation.flare.test_relays import Liar, double, exchange, recipe, request, start, visit


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.FlareEngine, "_introduction", lambda _: {})
    monkeypatch.setattr(session, "HOLD", 0.5)


def say(relay: silo_relay.SiloRelay, header: dict[str, Any], body: bytes = b"") -> dict[str, Any]:
    return envelope.unpack(relay.handle(envelope.pack(header, body)))[0]


def asking(identity: str, content: bytes | None = None, **more: Any) -> dict[str, Any]:
    wanted = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} if content is not None else None
    body = {"silo": "a", "verb": "train", "run": "run", "round": 0, "attempt": 0, "fields": {}}
    head = {"op": "ask", "id": identity, "request": body, "tensors": wanted, "retries": 1, "patience": 60.0}
    return {**head, **more}


@pytest.fixture
def relay(tmp_path: Path) -> silo_relay.SiloRelay:
    return silo_relay.SiloRelay("a", tmp_path / "spool", silo_relay.listen(tmp_path / "s"))


# -------------------------------------------------------------------- the coordinator's side


def test_a_reply_that_crosses_its_cancellation_keeps_no_place(tiny: Tiny, tmp_path: Path) -> None:
    """A silo answers while it is being cancelled, more often than there are places for updates."""
    answered = threading.Event()

    def late(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:  # noqa: ARG001
        answered.wait(5)
        return double(request, lambda _: None, should_stop)

    loop = Loop(tmp_path, ("a",), {"a": late})
    engine = start(loop, recipe(tiny), tmp_path / "run")
    for _ in range(session.WINDOW + 1):
        answered.clear()
        assert isinstance(next(iter(engine.exchange([request("a", {"x": torch.ones(3)})], 0.15))), Failure)
        answered.set()  # within the half second that the silo's relay holds back `wait`
        time.sleep(0.1)
    answers = list(engine.exchange([request("a", {"x": torch.ones(3)})], 4.0))
    assert isinstance(answers[0], Reply), answers
    engine.close()
    assert not list((tmp_path / "run/spool").iterdir())


def test_no_request_waits_for_a_carrier_that_is_busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A carrier that has taken a request, but was not scheduled since, is not free for the next one."""
    release, carried = threading.Event(), threading.Semaphore(0)

    class Slow(queue.SimpleQueue[Any]):
        def get(self, *args: Any, **more: Any) -> Any:
            found = super().get(*args, **more)
            time.sleep(0.05)
            return found

    monkeypatch.setattr("fedlm.federation.engines.flare.session.queue.SimpleQueue", Slow)

    def carry(_: session.Session, __: Any) -> None:
        carried.release()
        release.wait(10)

    monkeypatch.setattr(session.Session, "_carry", carry)
    used = session.Session(None, None, "run", tmp_path, "who")  # type: ignore[arg-type]
    body = {"silo": "a", "verb": "train", "run": "run", "round": 0, "attempt": 0, "fields": {}, "tensors": None}
    for number in range(6):
        used._begin(session._Job({**body, "job": number, "id": str(number), "retries": 0, "reconnect": 1}))
        time.sleep(0.02)
    try:
        for _ in range(6):
            assert carried.acquire(timeout=2)
    finally:
        release.set()


@pytest.mark.parametrize("value", [10**400, True, -(2**60)], ids=["huge", "bool", "below"])
def test_progress_that_no_display_can_show_is_dropped(value: Any) -> None:
    good = {"kind": "step", "round": 0, "step": 1, "steps": 2, "loss": 1.5, "tokens_per_second": 9.0}
    for name in ("loss", "round", "tokens_per_second"):
        assert progress({**good, name: value}) is None


def test_an_observer_that_fails_does_not_hang_the_exchange(tiny: Tiny, tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {"a": double})

    def observe(_: Event) -> None:
        raise RuntimeError("a display fell over")

    engine = FlareEngine(recipe(tiny), loop.kit.path, "run", tmp_path / "run", observe=observe)
    answers: list[Any] = []
    asked = threading.Thread(target=lambda: answers.extend(exchange(engine, {}, ("a",)).values()), daemon=True)
    asked.start()
    asked.join(5)
    assert answers and isinstance(answers[0], Failure) and "RuntimeError" in answers[0].reason
    engine.close()


@pytest.mark.parametrize("shape", [[0, 2**70], [2**40, 2**40, 0]])
def test_an_empty_tensor_of_absurd_shape_is_no_tensors_file(tmp_path: Path, shape: list[int]) -> None:
    file = tmp_path / "x"
    header = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    with pytest.raises(ValueError):
        FileTensors(file)


def test_an_update_has_a_bound(tiny: Tiny, tmp_path: Path) -> None:
    """A silo that announces an absurd update is not given the disk."""
    loop = Loop(tmp_path, ("a",), {})
    done = {"type": "reply", "fields": {}}
    answer = {"state": "done", "answer": done, "size": 2**30, "sha256": "0" * 64, "events": [], "told": 0}
    loop.network.relays["a"] = Liar(answer, bytes(2**20))  # type: ignore[assignment]
    engine = start(loop, recipe(tiny), tmp_path / "run")
    found = exchange(engine, {"x": torch.ones(3)}, ("a",), deadline=3.0)["a"]
    assert found.kind is FailureKind.ERROR and "larger than" in found.reason, found
    engine.close()


def test_events_are_bounded_and_status_is_clean(tiny: Tiny, tmp_path: Path) -> None:
    """A lying silo fills neither the run's ears nor the operator's terminal."""

    class Loud(Liar):
        def handle(self, message: bytes) -> bytes:
            header, _ = envelope.unpack(message)
            if header["op"] == "status":
                return envelope.pack(
                    {
                        "fedlm": "\x1b[2J0.1",
                        "busy": "\x1b]0;x\x07",
                        "card": {"rows": {"\x1b[31m": 1}},
                        "free_memory": "much",
                        "clock": float("nan"),
                        "worker": True,
                    }
                )
            return super().handle(message)

    loop = Loop(tmp_path, ("a",), {})
    step = {"kind": "step", "round": 0, "step": 1, "steps": 2, "loss": 1.5, "tokens_per_second": 9.0}
    answer = {"type": "failure", "kind": "error", "reason": "x"}
    done = {"state": "done", "answer": answer, "size": 0, "events": [step] * 5000, "told": 0}
    loop.network.relays["a"] = Loud(done)  # type: ignore[assignment]
    events: list[Event] = []
    engine = start(loop, recipe(tiny), tmp_path / "run", events)
    exchange(engine, {}, ("a",))
    assert len(events) <= MAX_EVENTS
    status = visit(loop, {"type": "status"})["silos"]["a"]
    assert status["worker"] and status["free_memory"] is None and status["clock_skew"] is None
    assert "\x1b" not in json.dumps(status, ensure_ascii=False)
    engine.close()


def test_a_label_is_no_command_to_the_terminal() -> None:
    card = {"rows": {"train": 1, "validation": 0, "test": 0}, "labels": {"\x1b[2J" + "x" * 1000: "many"}}
    with pytest.raises(UpdateRefused) as refused:
        check_card("a", {"card": card, "versions": {}})
    assert refused.value.what.isprintable() and len(refused.value.what) < 200


def test_status_shows_words_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A word in brackets would be a command to the table, and one that is not known ends it."""
    _table("loop", {"silos": {"a": {"connected": True, "fedlm": "[/x]", "card": {"rows": {":smile:": 1}}}}})
    out = capsys.readouterr().out
    assert "[/x]" in out and ":smile:" in out


def test_an_answer_too_long_for_the_run_is_a_failure(tiny: Tiny, tmp_path: Path) -> None:
    """Two bytes in the silo's message are six in ours."""

    class Long(Liar):
        def handle(self, message: bytes) -> bytes:
            if envelope.unpack(message)[0]["op"] != "wait":
                return envelope.pack({"state": "running"})
            answer = {"type": "reply", "fields": {"x": "\u00e9" * 6 * 2**20}}
            header = {"protocol": 1, "state": "done", "answer": answer, "size": 0, "events": [], "told": 0}
            text = json.dumps(header, ensure_ascii=False).encode()
            return len(text).to_bytes(4, "big") + text

    loop = Loop(tmp_path, ("a",), {})
    loop.network.relays["a"] = Long({})  # type: ignore[assignment]
    engine = start(loop, recipe(tiny), tmp_path / "run")
    for _ in range(2):
        found = exchange(engine, {}, ("a",), deadline=10.0)["a"]
        assert isinstance(found, Failure) and found.kind is FailureKind.ERROR, found
    engine.close()


def test_a_model_that_is_gone_when_it_is_sent(tmp_path: Path) -> None:
    """The run gave a request up and removed its file while the silo was still receiving it: the silo is told."""
    told: list[str] = []

    class Net:
        def send(self, _: str, message: bytes, __: float) -> bytes:
            told.append(envelope.unpack(message)[0]["op"])
            if told[-1] == "ask":
                (tmp_path / "m").unlink()
                threading.Timer(0.2, job.cancelled.set).start()
                return envelope.pack({"state": "receiving", "held": 0})
            return envelope.pack({"state": "dropped"})

    (tmp_path / "m").write_bytes(bytes(2**20))
    used = session.Session(Net(), None, "run", tmp_path, "who")  # type: ignore[arg-type]
    body = {"silo": "a", "verb": "train", "run": "run", "round": 0, "attempt": 0, "fields": {}, "job": 1, "id": "1"}
    tensors = {"name": "m", "size": 2**20, "sha256": "0" * 64}
    job = session._Job({**body, "tensors": tensors, "retries": 0, "reconnect": 1})
    assert used._carry(job) is None
    assert told == ["ask", "cancel"]


# -------------------------------------------------------------------- the silo's side


def test_a_broken_transfer_can_begin_again(relay: silo_relay.SiloRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk was full and is not any more: the same model can be sent again."""
    content = bytes(100)
    say(relay, asking("1", content), content[:50])
    incoming = next(iter(relay._files.values()))

    class Full:
        closed = False

        def write(self, _: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(incoming, "_file", Full())
    say(relay, {"op": "put", "id": "1", "offset": 50}, content[50:])
    assert "No space" in say(relay, {"op": "wait", "id": "1", "told": 0, "seconds": 0})["answer"]["reason"]
    assert say(relay, asking("2", content)) == {"state": "receiving", "held": 0, "protocol": 1}
    say(relay, {"op": "put", "id": "2", "offset": 0}, content)
    assert incoming.path.read_bytes() == content


def test_answers_that_nobody_fetches_go(
    relay: silo_relay.SiloRelay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that was killed never fetches what it had asked for; its successor asks under other names."""
    monkeypatch.setattr(silo_relay, "KEPT_SECONDS", 0.3)
    say(relay, asking("1", bytes(100)), bytes(50))  # half a model
    say(relay, asking("2"))
    with relay._changed:
        asked = relay._asked["2"]
        asked.file = tmp_path / "spool/reply"
        asked.file.write_bytes(b"update")
        relay._settle(asked, {"type": "reply", "fields": {}})
    until = time.monotonic() + 5
    while relay._asked and time.monotonic() < until:
        time.sleep(0.05)
    assert not relay._asked and not (tmp_path / "spool/reply").exists()


@pytest.mark.parametrize(
    "header",
    [
        {"op": "wait", "id": "1", "told": 0, "seconds": float("nan")},
        {"op": "wait", "id": "1", "told": float("inf"), "seconds": 0},
        {"op": "get", "id": "1", "offset": -1},
        {"op": "get", "id": "1", "offset": 10**30},
        asking("2", patience=float("nan")),
        asking("2", retries=float("inf")),
        asking("2", request={"silo": "a"}),
        asking("2", request={"silo": "a", "verb": "train", "run": "r", "round": "x", "attempt": 0, "fields": {}}),
        asking("2", request={**asking("2")["request"], "fields": {"x": "x" * 2**21}}),
        asking("2", request={**asking("2")["request"], "round": 10**40}),
    ],
)
def test_a_hostile_header_is_an_error_at_once(
    relay: silo_relay.SiloRelay, tmp_path: Path, header: dict[str, Any]
) -> None:
    say(relay, asking("1"))
    with relay._changed:
        relay._asked["1"].file = tmp_path / "spool/reply"
        relay._asked["1"].file.write_bytes(b"update")
    found: list[dict[str, Any]] = []
    answered = threading.Thread(target=lambda: found.append(say(relay, header)), daemon=True)
    answered.start()
    answered.join(3)
    assert found and "error" in found[0], found
    assert say(relay, {"op": "status"})["name"] == "a"


@pytest.mark.parametrize("content", [b"no safetensors" * 10, save({"x": torch.ones(2)})[:-1]], ids=["noise", "cut"])
def test_a_broken_model_does_not_end_the_worker(tmp_path: Path, content: bytes) -> None:
    loop = Loop(tmp_path, ("a",), {"a": double})
    relay = loop.network.relays["a"]
    until = time.monotonic() + 5
    while relay._worker is None and time.monotonic() < until:
        time.sleep(0.02)
    say(relay, asking("1", content), content)
    answer = say(relay, {"op": "wait", "id": "1", "told": 0, "seconds": 5})["answer"]
    assert answer["type"] == "failure" and "cannot be read" in answer["reason"]
    assert relay._worker is not None
    good = save({"x": torch.ones(2)})
    say(relay, asking("2", good), good)
    assert say(relay, {"op": "wait", "id": "2", "told": 1, "seconds": 5})["answer"]["type"] == "reply"


def test_a_worker_started_anew_waits_for_the_old_ones_place(tmp_path: Path) -> None:
    """A relay that is still reading the dead worker's last answer does not know yet that it is dead."""
    loop = Loop(tmp_path, ("a",), {})
    relay = loop.network.relays["a"]
    old = Lines(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    with relay._changed:
        relay._worker = old
    failed: list[str] = []

    def work() -> None:
        try:
            serve(socket_path(loop.kits["a"].path), double, {})
        except Exception as error:
            failed.append(str(error))

    threading.Thread(target=work, daemon=True).start()
    time.sleep(1.0)
    with relay._changed:
        relay._worker = None
    until = time.monotonic() + 5
    while relay._worker is None and not failed and time.monotonic() < until:
        time.sleep(0.05)
    assert relay._worker is not None and not failed


def test_an_answer_that_finds_no_relay_leaves_no_file(tmp_path: Path) -> None:
    loop = Loop(tmp_path, ("a",), {})
    relay = loop.network.relays["a"]

    def cut(request: Request, observe: Observe, should_stop: Callable[[], bool]) -> Reply | Failure:  # noqa: ARG001
        worker, relay._worker = relay._worker, None
        assert worker is not None
        worker._socket.shutdown(2)
        return Reply(request.silo, request.verb, request.run, request.round, request.attempt, {"x": torch.ones(3)}, {})

    loop.start_worker("a", cut)
    say(relay, asking("1", retries=0))
    say(relay, {"op": "wait", "id": "1", "told": 0, "seconds": 3})
    time.sleep(0.5)
    assert not list((loop.kits["a"].run / "spool").glob("reply-*"))
